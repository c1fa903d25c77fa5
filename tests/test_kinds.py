"""Every wrong kind of object at every argument of every public function: one error of ours."""

import decimal
import fractions
import inspect
import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import wmtp
from wmtp import once
from wmtp.reference import compute_weighted_mtp_loss

numpy = pytest.importorskip("numpy")
PACKAGE = Path(wmtp.__file__).parent
B, S, H, V, D = 2, 6, 3, 11, 4

# Tensors that fit; what else an argument takes; and its own wrong shapes.
LOGITS, IDS = torch.randn(B, S, H, V), torch.randint(V - 1, (B, S))
HEAD, WEIGHTS, REF_CE = LOGITS[:, :, 0], torch.rand(B, S, H), torch.rand(B, S - 1)
HIDDEN, LM_HEAD = torch.randn(B, S, H, D), torch.randn(V, D)

CALLS = {
    wmtp.fused_weighted_mtp_loss: dict(logits=LOGITS, target_ids=IDS),
    compute_weighted_mtp_loss: dict(logits=LOGITS, target_ids=IDS, horizon=H),
    wmtp.mtp_cross_entropy: dict(logits=LOGITS, target_ids=IDS),
    wmtp.next_token_cross_entropy: dict(logits=HEAD, target_ids=IDS),
    wmtp.fused_linear_weighted_mtp_loss: dict(
        hidden=HIDDEN, lm_head_weight=LM_HEAD, target_ids=IDS
    ),
    wmtp.linear_next_token_cross_entropy: dict(
        hidden=HIDDEN[:, :, 0], lm_head_weight=LM_HEAD, target_ids=IDS
    ),
    wmtp.excess_head_weights: dict(ce_per_head=WEIGHTS, ref_ce=REF_CE, target_ids=IDS),
    wmtp.td_head_weights: dict(values=WEIGHTS[..., 0], target_ids=IDS, horizon=H),
}
FITTING = dict(
    logits=LOGITS, target_ids=IDS, head_weights=WEIGHTS, ref_logits=HEAD, ref_ce=REF_CE,
    hidden=HIDDEN, lm_head_weight=LM_HEAD, lm_head_bias=LM_HEAD[:, 0], ce_per_head=WEIGHTS,
    values=WEIGHTS[..., 0],
)  # fmt: skip

OBJECTS = {
    "None": None,
    "a word": "logits",
    "bytes": b"logits",
    "a bool": True,
    "an int": 7,
    "a negative int": -7,
    "too large an int": 2**63,
    "a float": 0.5,
    "a negative float": -0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "a complex number": 1j,
    "a decimal": decimal.Decimal("0.5"),
    "a fraction": fractions.Fraction(1, 2),
    "a numpy float": numpy.float32(0.5),
    "a numpy int": numpy.int64(7),
    "a numpy array": numpy.ones((B, S)),
    "an empty list": [],
    "a list of numbers": [1.0, 2.0],
    "a list of lists": [[1, 2], [3, 4]],
    "a tuple": (1, 2),
    "a dict": {},
    "a dict of logits": {"logits": LOGITS},
    "an output": SimpleNamespace(logits=LOGITS),
    "a module": torch.nn.Linear(D, V),
    "an object": object(),
    "a type": float,
    "a function": len,
    "a generator": (head for head in [HEAD]),
    "a dtype": torch.int64,
    "a device": torch.device("cpu"),
    "a 0-d tensor": torch.tensor(0.5),
    "a 0-d int tensor": torch.tensor(7),
    "a 0-d bool tensor": torch.tensor(True),
    "a 0-d complex tensor": torch.tensor(1j),
    "a negative 0-d tensor": torch.tensor(-0.5),
    "a 0-d tensor elsewhere": torch.tensor(0.5, device="meta"),
    "a tensor of rank 1": torch.ones(3),
    "a tensor of rank 5": torch.ones(1, 1, 1, 1, 1),
    "an empty tensor": torch.ones(0),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a list of tensors": [torch.ones(2), torch.ones(2)],
}


def variants(tensor):
    """Wrong kinds of a tensor that fits."""
    floating = tensor.is_floating_point()
    made = {
        "bool": tensor.bool(),
        "complex": tensor.to(torch.complex64),
        "of ids": tensor.long() if floating else tensor.float(),
        "sparse": tensor.to_sparse(),
        "elsewhere": tensor.to("meta"),
        "one axis less": tensor[0],
        "one axis more": tensor[None],
        "flat": tensor.flatten(),
        "turned round": tensor.permute(*reversed(range(tensor.dim()))),
        "shorter": tensor[:-1],
        "without any": tensor[:0],
        "quantized": torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        "numpy": tensor.numpy(),
        "list": tensor.tolist(),
    }
    if tensor.dim() == 1:
        del made["flat"], made["turned round"]
    return made


# What is right after all, of the objects above.
OPTIONAL = {"None"}
NUMBERS = {"an int", "too large an int", "a float", "a fraction", "a numpy float", "a numpy int"}
NUMBERS |= {"a 0-d tensor", "a 0-d int tensor"}
PLAIN_NUMBERS = {name for name in NUMBERS if "tensor" not in name}
WHOLE = {"an int", "a numpy int"}
RIGHT = {
    "head_weights": OPTIONAL | {"a tensor of rank 1"},  # of the heads
    "head_prior": OPTIONAL | {"a tensor of rank 1"},
    "shifted": {"a bool"},
    "offsets": OPTIONAL,
    "document_ids": OPTIONAL,
    "target_mask": OPTIONAL,
    "position_mask": OPTIONAL,
    "reduction": OPTIONAL,
    "length": OPTIONAL | WHOLE,
    "weighting": OPTIONAL,
    "ref_logits": OPTIONAL,
    "lm_head_bias": OPTIONAL,
    "grad_accum_dtype": OPTIONAL,
    "temperature": NUMBERS,
    "normalizer": OPTIONAL | NUMBERS | {"a negative 0-d tensor"},  # a tensor is not looked into
    "ignore_index": WHOLE | {"a negative int"},
    "chunk_bytes": OPTIONAL | WHOLE,
    "inplace": {"a bool"},
    "lm_head_weight": {"shorter"},  # of another vocabulary
    "discount": {"a float", "a fraction", "a numpy float"},
    "logit_scale": PLAIN_NUMBERS,
    "softcap": OPTIONAL | PLAIN_NUMBERS,
    "sigmoid_cap": OPTIONAL,
    "z_loss": PLAIN_NUMBERS,
    "label_smoothing": {"a float", "a fraction", "a numpy float"},
    "vocab_size": OPTIONAL | WHOLE,
    "metrics": {"a bool"},
    "hidden_grad_heads": OPTIONAL | {"an empty list", "a tuple"},
    "weight_grad_heads": OPTIONAL | {"an empty list", "a tuple"},
}


def right(function, argument):
    if (function, argument) == (wmtp.excess_head_weights, "shifted"):
        return set()  # its ref_ce would be another
    if argument == "ref_ce":
        return set() if function is wmtp.excess_head_weights else OPTIONAL
    if argument == "horizon":
        return WHOLE if function is wmtp.td_head_weights else OPTIONAL
    return RIGHT.get(argument, set())


LOSSES = (
    wmtp.fused_weighted_mtp_loss,
    wmtp.fused_linear_weighted_mtp_loss,
    compute_weighted_mtp_loss,
)
PAIRS = [
    pytest.param(function, argument, id=f"{function.__name__}-{argument}")
    for function in CALLS
    for argument in inspect.signature(function).parameters
]


@pytest.mark.parametrize(("function", "argument"), PAIRS)
@pytest.mark.filterwarnings("ignore")  # torch's, of nested and sparse tensors
def test_one_error_of_ours(function, argument):
    """It names the argument, and lets nothing come to torch that torch would refuse."""
    # A tensor by which the others' shapes are judged may be wrong in what they are then told.
    leading = argument == next(iter(CALLS[function]))
    objects = OBJECTS | (variants(FITTING[argument]) if argument in FITTING else {})
    accepted = set()
    others = {"ref_ce": REF_CE} if argument == "temperature" and function in LOSSES else {}
    for name, value in objects.items():
        try:
            function(**{**CALLS[function], **others, argument: value})
        except (ValueError, TypeError) as error:
            message, raised_by = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
            assert PACKAGE in Path(raised_by).parents, (name, message)
            named = (
                [*CALLS[function]] if leading and isinstance(value, torch.Tensor) else [argument]
            )
            if argument == "shifted":  # which the reference must then be, too
                named = ["shifted", "ref_ce"]
            assert any(candidate in message for candidate in named), (name, message)
            assert re.search("(got|is on) .*: .", message), (name, message)
        except IndexError:  # of a target
            assert argument == "vocab_size"
            accepted.add(name)
        else:
            accepted.add(name)
    assert accepted == right(function, argument)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("value", [OBJECTS[name] for name in sorted(NUMBERS)], ids=sorted(NUMBERS))
def test_every_kind_of_number_is_that_number(value, backend):
    """A temperature and a normalizer, in both operators."""
    number = float(value)
    for function, given in (
        (wmtp.fused_weighted_mtp_loss, (LOGITS, IDS)),
        (wmtp.fused_linear_weighted_mtp_loss, (HIDDEN, LM_HEAD, IDS)),
    ):
        for argument in ("temperature", "normalizer"):
            how = {"ref_ce": REF_CE, "backend": backend}
            found = function(*given, **how, **{argument: value}).loss
            assert found == function(*given, **how, **{argument: number}).loss
    for weights in (
        lambda temperature: wmtp.excess_head_weights(WEIGHTS, REF_CE, IDS, temperature),
        lambda temperature: wmtp.td_head_weights(WEIGHTS[..., 0], IDS, H, 0.9, temperature),
    ):
        assert torch.equal(weights(value), weights(number))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_numpy_ignore_index_and_horizon(backend):
    ids = IDS.clone()
    ids[:, 2] = 7
    for function, given in (
        (wmtp.fused_weighted_mtp_loss, (LOGITS, ids)),
        (wmtp.mtp_cross_entropy, (LOGITS, ids)),
        (wmtp.next_token_cross_entropy, (HEAD, ids)),
        (wmtp.fused_linear_weighted_mtp_loss, (HIDDEN, LM_HEAD, ids)),
        (wmtp.linear_next_token_cross_entropy, (HIDDEN[:, :, 0], LM_HEAD, ids)),
    ):
        found = function(*given, ignore_index=numpy.int64(7), backend=backend)
        wanted = function(*given, ignore_index=7, backend=backend)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found = wmtp.td_head_weights(WEIGHTS[..., 0], ids, numpy.int64(H), ignore_index=numpy.int64(7))
    assert torch.equal(found, wmtp.td_head_weights(WEIGHTS[..., 0], ids, H, ignore_index=7))


REMEDIES = {
    "an output": (dict(logits=SimpleNamespace(logits=LOGITS)), r"pass \.logits"),
    "a dict": (dict(logits={"logits": LOGITS}), r'pass \["logits"\]'),
    "a reference's output": (dict(ref_logits=SimpleNamespace(logits=HEAD)), r"pass \.logits"),
    "an array": (dict(logits=LOGITS.numpy()), "pass torch.as_tensor of it"),
    "a list of ids": (dict(target_ids=IDS.tolist()), "pass torch.tensor of it"),
    "[B, H, S, V], H > S": (
        dict(logits=torch.randn(B, S + 2, S, V)),
        r"logits seems to be \[B, H, S, ...\], pass logits.transpose\(1, 2\)",
    ),
    "[S, B, H, V]": (dict(logits=LOGITS.transpose(0, 1)), r"pass logits.transpose\(0, 1\)"),
    "heads [S, B, V]": (
        dict(logits=[HEAD.transpose(0, 1)] * 2),
        r"pass logits.transpose\(0, 1\)",
    ),
    "sparse": (dict(logits=LOGITS.to_sparse()), r"pass logits.to_dense\(\)"),
    "one head's logits": (dict(logits=HEAD), r"add the head axis with logits.unsqueeze\(2\)"),
}


@pytest.mark.parametrize(("bad", "remedy"), REMEDIES.values(), ids=REMEDIES)
def test_the_remedy(bad, remedy):
    with pytest.raises((TypeError, ValueError), match=remedy):
        wmtp.fused_weighted_mtp_loss(**{**CALLS[wmtp.fused_weighted_mtp_loss], **bad})


def test_heads_and_positions_that_may_have_changed_places(monkeypatch):
    """T = H > S is legal, and is most often [B, H, S, V]."""
    monkeypatch.setattr(once, "_said", set())
    with pytest.warns(RuntimeWarning, match=r"if they are \[B, H, S, ...\], pass logits.transpose"):
        wmtp.fused_weighted_mtp_loss(LOGITS.transpose(1, 2), IDS)


def test_the_remedies_of_the_linear_loss():
    layer, output = torch.nn.Linear(D, V), SimpleNamespace(last_hidden_state=HIDDEN)
    loss = wmtp.fused_linear_weighted_mtp_loss
    with pytest.raises(TypeError, match=r"lm_head_weight .* got Linear: pass \.weight"):
        loss(HIDDEN, layer, IDS)
    with pytest.raises(TypeError, match=r"lm_head_bias .* got Linear: pass \.bias"):
        loss(HIDDEN, layer.weight, IDS, lm_head_bias=layer)
    with pytest.raises(TypeError, match=r"hidden .* got SimpleNamespace: pass \.last_hidden_state"):
        loss(output, layer.weight, IDS)
    with pytest.raises(ValueError, match=r"pass hidden.transpose\(1, 2\)"):
        loss(torch.randn(B, S + 2, S, D), layer.weight, IDS)
    with pytest.raises(ValueError, match="all heads' hidden must have one dtype"):
        loss([HIDDEN[:, :, 0], HIDDEN[:, :, 1].double()], layer.weight, IDS)


@pytest.mark.parametrize("bad", [None, 1.5, 2**63, -(2**63) - 1, True, "x"], ids=str)
def test_one_error_for_every_ignore_index(bad):
    for function, call in CALLS.items():
        with pytest.raises(ValueError, match="ignore_index must be a whole number that an int64"):
            function(**call, ignore_index=bad)
