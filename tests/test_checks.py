"""Each bad argument gets one error that says what was found, what was wanted and the remedy."""

import pytest
import torch

from wmtp import (
    excess_head_weights,
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
    td_head_weights,
)
from wmtp.reference import compute_weighted_mtp_loss

LOGITS, IDS = torch.zeros(2, 8, 4, 11), torch.zeros(2, 8, dtype=torch.long)
WEIGHTS, REF_CE = torch.ones(2, 8, 4), torch.zeros(2, 7)

BAD_CALLS = {
    "logits not a tensor": (dict(logits=1.0), TypeError, "logits must be a tensor .*got float"),
    "logits of rank 3": (
        dict(logits=LOGITS[:, :, 0]),
        ValueError,
        r"logits must be \[B, S, H, V\], got \(2, 8, 11\): .*unsqueeze\(2\)",
    ),
    "integer logits": (dict(logits=LOGITS.long()), TypeError, "logits must be float32.*int64"),
    "float8 logits": (dict(logits=LOGITS.to(torch.float8_e5m2)), TypeError, "float8_e5m2"),
    "no vocabulary": (dict(logits=LOGITS[..., :0]), ValueError, "at least one head and one voc"),
    "no heads": (dict(logits=LOGITS[:, :, :0]), ValueError, "at least one head"),
    "targets not a tensor": (dict(target_ids=[[1]]), TypeError, "target_ids must be a tensor"),
    "targets not integer": (dict(target_ids=IDS.float()), TypeError, "integers, got torch.float32"),
    "bool targets": (dict(target_ids=IDS.bool()), TypeError, "integers, got torch.bool"),
    "shifted targets": (
        dict(target_ids=IDS[..., None].expand(2, 8, 5)),
        ValueError,
        r"target_ids must be \[B, S, H\] = \(2, 8, 4\), got \(2, 8, 5\): a target for each",
    ),
    "targets of another length": (dict(target_ids=IDS[:, 1:]), ValueError, r"got \(2, 7\)"),
    "weights of another shape": (
        dict(head_weights=WEIGHTS[..., :1]),
        ValueError,
        r"head_weights must be \[B, S, H\] = \(2, 8, 4\), got \(2, 8, 1\)",
    ),
    "integer weights": (dict(head_weights=WEIGHTS.long()), TypeError, r"head_weights\.float\(\)"),
    "weights not a tensor": (dict(head_weights=1.0), TypeError, "head_weights must be a tensor"),
    "ref_ce of length S": (
        dict(ref_ce=torch.zeros(2, 8)),
        ValueError,
        r"ref_ce must be \[B, T-1\] = \(2, 7\), got \(2, 8\)",
    ),
    "integer ref_ce": (dict(ref_ce=REF_CE.long()), TypeError, "ref_ce must be floating point"),
    "ref_logits of rank 4": (dict(ref_logits=LOGITS), ValueError, r"ref_logits must be \[B, S, V"),
    "ref_logits of another batch": (
        dict(ref_logits=LOGITS[:1, :, 0]),
        ValueError,
        r"ref_logits must be \[B, S, V\] = \(2, 8, 11\), got \(1, 8, 11\)",
    ),
    "weights and ref_ce": (
        dict(head_weights=WEIGHTS, ref_ce=REF_CE),
        ValueError,
        "head_weights and ref_ce exclude each other",
    ),
    "ref_logits and ref_ce": (
        dict(ref_logits=LOGITS[:, :, 0], ref_ce=REF_CE),
        ValueError,
        "ref_logits and ref_ce exclude each other",
    ),
    "temperature 0": (dict(temperature=0), ValueError, "temperature must be .*> 0, got 0"),
    "temperature -1": (dict(temperature=-1.0), ValueError, "got -1.0"),
    "temperature nan": (dict(temperature=float("nan")), ValueError, "got nan"),
    "unknown excess": (dict(excess="relu"), ValueError, "excess must be one of 'abs', 'signed'"),
    "unknown reduction": (
        dict(reduction="mean"),
        ValueError,
        "reduction must be one of 'token_mean', 'weight_mean', .*'head_mean', 'sum', got 'mean'",
    ),
    "normalizer 0": (dict(normalizer=0), ValueError, "normalizer must be .*> 0, got 0"),
    "normalizer of rank 1": (
        dict(normalizer=torch.ones(2)),
        ValueError,
        r"normalizer \[H\] goes with",
    ),
    "another horizon": (
        dict(horizon=3),
        ValueError,
        "horizon must equal the number of heads H = 4, got 3",
    ),
    "mixed devices": (
        dict(target_ids=IDS.to("meta")),
        ValueError,
        "target_ids is on meta, and logits on cpu: move it with .*to",
    ),
    "weights elsewhere": (dict(head_weights=WEIGHTS.to("meta")), ValueError, "head_weights is on"),
}


@pytest.mark.parametrize("function", [fused_weighted_mtp_loss, compute_weighted_mtp_loss])
@pytest.mark.parametrize(("bad", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments(function, bad, error, message):
    with pytest.raises(error, match=message):
        function(**{"logits": LOGITS, "target_ids": IDS, **bad})


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'cpu', 'triton', 'eager'"):
        fused_weighted_mtp_loss(LOGITS, IDS, backend="cuda")


def test_inplace_needs_a_contiguous_vocabulary():
    logits = LOGITS.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"inplace=True needs rows .*contiguous"):
        fused_weighted_mtp_loss(logits, IDS, inplace=True, backend="cpu")


@pytest.mark.parametrize("axis", [0, 1])
def test_inplace_needs_rows_of_their_own(axis):
    logits = LOGITS.narrow(axis, 0, 1).expand(LOGITS.shape)
    with pytest.raises(ValueError, match="inplace=True needs rows of their own"):
        fused_weighted_mtp_loss(logits, IDS, inplace=True, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_any_integer_target_dtype(dtype, backend):
    logits, ids = torch.randn(2, 8, 4, 11), torch.randint(11, (2, 8))
    expected = fused_weighted_mtp_loss(logits, ids, ref_ce=REF_CE, backend=backend).loss
    found = fused_weighted_mtp_loss(logits, ids.to(dtype), ref_ce=REF_CE, backend=backend).loss
    assert found == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mtp_cross_entropy(LOGITS[0], IDS), ValueError, r"logits must be \[B, S, H, V\]"),
        (lambda: next_token_cross_entropy(LOGITS, IDS), ValueError, r"logits must be \[B, S, V\]"),
        (
            lambda: next_token_cross_entropy(LOGITS[:, :, 0], IDS.float()),
            TypeError,
            "target_ids must hold integers",
        ),
        (
            lambda: next_token_cross_entropy(LOGITS[:, :, 0], IDS + 11),
            IndexError,
            r"target_ids asks head 0 at \[0, 0\] for 11, outside \[0, 11\)",
        ),
        (
            lambda: excess_head_weights(WEIGHTS, WEIGHTS[..., 0], IDS),
            ValueError,
            r"ref_ce must be \[B, T-1\] = \(2, 7\)",
        ),
        (
            lambda: excess_head_weights(WEIGHTS[0], REF_CE, IDS),
            ValueError,
            r"ce_per_head must be \[B, S, H\], got",
        ),
        (lambda: excess_head_weights(WEIGHTS.int(), REF_CE, IDS), TypeError, "floating point"),
        (
            lambda: excess_head_weights(WEIGHTS, REF_CE, IDS, temperature=0.0),
            ValueError,
            "temperature",
        ),
        (lambda: excess_head_weights(WEIGHTS, REF_CE, IDS, excess="x"), ValueError, "excess"),
        (lambda: td_head_weights(WEIGHTS, IDS, 4), ValueError, r"values must be .*\[B, S\]"),
        (lambda: td_head_weights(WEIGHTS[..., 0], IDS, 0), ValueError, "horizon must be .* >= 1"),
        (lambda: td_head_weights(WEIGHTS[..., 0], IDS, 4, 1.5), ValueError, "discount must be in"),
        (lambda: td_head_weights(WEIGHTS[..., 0], IDS, 4, 0.9, -1), ValueError, "temperature"),
        (
            lambda: td_head_weights(WEIGHTS[..., 0], IDS[:1], 4),
            ValueError,
            r"target_ids must be \[B, T >= S\]",
        ),
    ],
)
def test_bad_arguments_of_the_other_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


HIDDEN, LM_HEAD = torch.zeros(2, 8, 4, 3), torch.zeros(11, 3)
BAD_LINEAR_CALLS = {
    "hidden of rank 3": (
        dict(hidden=HIDDEN[:, :, 0]),
        ValueError,
        r"hidden must be \[B, S, H, D\], got \(2, 8, 3\): .*unsqueeze\(2\)",
    ),
    "integer hidden": (dict(hidden=HIDDEN.long()), TypeError, "hidden must be float32.*int64"),
    "hidden not a tensor": (dict(hidden=[1.0]), TypeError, "hidden must be a tensor"),
    "a transposed weight": (
        dict(lm_head_weight=LM_HEAD.T),
        ValueError,
        r"lm_head_weight must be \[V, D\] = \(3, 3\), got \(3, 11\): pass lm_head.weight as",
    ),
    "weight of rank 1": (dict(lm_head_weight=LM_HEAD[0]), ValueError, r"\[V, D\] = .*: pass lm"),
    "no vocabulary": (dict(lm_head_weight=LM_HEAD[:0]), ValueError, "at least one vocabulary"),
    "integer weight": (dict(lm_head_weight=LM_HEAD.long()), TypeError, "lm_head_weight must be fl"),
    "no channels": (
        dict(hidden=HIDDEN[..., :0], lm_head_weight=LM_HEAD[:, :0]),
        ValueError,
        "at least one head and one channel",
    ),
    "the module": (
        dict(lm_head_weight=torch.nn.Linear(3, 11)),
        TypeError,
        "lm_head_weight must be a tensor",
    ),
    "bias of another length": (
        dict(lm_head_bias=torch.zeros(3)),
        ValueError,
        r"lm_head_bias must be \[V\] = \(11,\), got \(3,\): one number for each row",
    ),
    "integer bias": (dict(lm_head_bias=IDS[0, :1]), TypeError, "lm_head_bias must be floating"),
    "two dtypes": (
        dict(lm_head_weight=LM_HEAD.bfloat16()),
        TypeError,
        "must have one dtype, got bfloat16 and float32: convert one, or .*autocast",
    ),
    "weight elsewhere": (
        dict(lm_head_weight=LM_HEAD.to("meta")),
        ValueError,
        "lm_head_weight is on meta",
    ),
    "no chunk": (dict(chunk_bytes=0), ValueError, "chunk_bytes must be a whole number >= 1, got 0"),
    "half a byte": (dict(chunk_bytes=0.5), ValueError, "chunk_bytes must be .*got 0.5"),
    "chunk_bytes=True": (dict(chunk_bytes=True), ValueError, "chunk_bytes must be .*got True"),
    "shifted targets": (
        dict(target_ids=IDS[..., None].expand(2, 8, 5)),
        ValueError,
        r"target_ids must be \[B, S, H\] = \(2, 8, \d\), got \(2, 8, 5\)",
    ),
    "a target outside": (
        dict(target_ids=IDS + 11),
        IndexError,
        r"target_ids asks head 0 at \[0, 0\] for 11, outside \[0, 11\)",
    ),
    "unknown backend": (dict(backend="cuda"), ValueError, "backend must be one of"),
}
BAD_LINEAR_LOSSES = {
    "a narrow accumulator": (
        dict(grad_accum_dtype=torch.bfloat16),
        ValueError,
        "grad_accum_dtype must be float32 or .*got torch.bfloat16",
    ),
    "weights of another shape": (
        dict(head_weights=WEIGHTS[..., :1]),
        ValueError,
        r"head_weights must be \[B, S, H\] = \(2, 8, 4\)",
    ),
    "negative weights": (
        dict(head_weights=-WEIGHTS),
        ValueError,
        r"head_weights\[0, 0, 0\] is -1.0",
    ),
    "weights and ref_ce": (
        dict(head_weights=WEIGHTS, ref_ce=REF_CE),
        ValueError,
        "head_weights and ref_ce exclude each other",
    ),
    "ref_ce of length S": (dict(ref_ce=torch.zeros(2, 8)), ValueError, r"ref_ce must be \[B, T-1"),
    "temperature 0": (dict(temperature=0), ValueError, "temperature must be"),
    "unknown excess": (dict(excess="relu"), ValueError, "excess must be one of"),
    "unknown reduction": (dict(reduction="mean"), ValueError, "reduction must be one of"),
    "normalizer 0": (dict(normalizer=0), ValueError, "normalizer must be"),
    "another horizon": (dict(horizon=3), ValueError, "horizon must equal .*H = 4, got 3"),
}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [*BAD_LINEAR_CALLS.values(), *BAD_LINEAR_LOSSES.values()],
    ids=[*BAD_LINEAR_CALLS, *BAD_LINEAR_LOSSES],
)
def test_bad_arguments_of_the_linear_loss(bad, error, message):
    arguments = {"hidden": HIDDEN, "lm_head_weight": LM_HEAD, "target_ids": IDS, **bad}
    with pytest.raises(error, match=message):
        fused_linear_weighted_mtp_loss(**arguments)


OF_THE_REFERENCE = {
    name: case for name, case in BAD_LINEAR_CALLS.items() if "hidden" not in case[0]
}


@pytest.mark.parametrize(
    ("bad", "error", "message"), OF_THE_REFERENCE.values(), ids=OF_THE_REFERENCE
)
def test_bad_arguments_of_the_linear_reference(bad, error, message):
    hidden = HIDDEN[:, :, 0]
    with pytest.raises(error, match=message):
        linear_next_token_cross_entropy(
            **{"hidden": hidden, "lm_head_weight": LM_HEAD, "target_ids": IDS, **bad}
        )


def test_hidden_states_of_the_linear_reference():
    with pytest.raises(ValueError, match=r"hidden must be \[B, S, D\], got \(2, 8, 4, 3\)"):
        linear_next_token_cross_entropy(HIDDEN, LM_HEAD, IDS)
