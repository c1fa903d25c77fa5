"""The training loop, once: what differs between the algorithms is in their few methods.

A step is: model -> loss arguments (which weights) -> loss -> gradients -> finite? -> update.
Batches are a function of (seed, step), so a run that resumes from a checkpoint walks the same path
as one that was never stopped.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_model
from torch import Tensor

from wmtp.data import Batch, PreparedData
from wmtp.labels import has_target
from wmtp.models import MTPOutput, MTPTransformer, ValueHead
from wmtp.models.storage import save_model_folder
from wmtp.trainers.config import ConfigError, TrainConfig
from wmtp.trainers.evaluation import (
    Evaluation,
    evaluate,
    peak_memory_bytes,
    step_statistics,
)
from wmtp.trainers.losses import LossArguments, weighted_loss
from wmtp.trainers.optimizer import build_optimizer
from wmtp.trainers.reference_model import Reference, prepare_reference
from wmtp.trainers.run_folder import RunFolder

TRAIN, VALUE_WARMUP = "train", "value_warmup"
# The value head's warm-up has batches of its own: step i of the model is the same for all.
STREAMS = {TRAIN: 0, VALUE_WARMUP: 1}


class NonFiniteError(RuntimeError):
    """A step came out as NaN or infinity; nothing was updated."""


class BaseWmtpTrainer:
    """Trains an `MTPTransformer` with uniform weights; algorithms override the first methods.

    Args:
        config: the settings.
        data: from `wmtp.data.prepare_data`.
        folder: opened already; what it holds of this run is continued.
        reference: for the algorithms that compare with one: an `MTPTransformer` of one head, or
            anything from input_ids [B, S] to logits.

    Raises:
        ConfigError: the algorithm needs a reference and got none.
    """

    needs_reference: ClassVar[bool] = False

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        folder: RunFolder,
        reference: Reference | None = None,
    ) -> None:
        if self.needs_reference and reference is None:
            raise ConfigError(f"{config.algo} needs a reference model: pass reference=")
        self.config = config
        self.data = data
        self.folder = folder
        self.reference: Any = reference
        self.step = 0  # steps done, the value head's warm-up included
        self.evaluation_at_start: Evaluation | None = None

    # ---- what an algorithm may say ----

    def build_value_head(self) -> ValueHead | None:
        """A value head to train beside the model."""
        return None

    def loss_arguments(self, batch: Batch, output: MTPOutput) -> LossArguments:
        """The weights, or what the loss forms them from. Uniform: nothing."""
        return {}

    def compute_head_weights(
        self, batch: Batch, ce_per_head: Tensor, arguments: LossArguments
    ) -> Tensor:
        """The weights [B, S, H] that the loss used, for the record."""
        if "head_weights" in arguments:
            return arguments["head_weights"]
        return has_target(batch["target_ids"], self.config.horizon).to(ce_per_head.dtype)

    def value_loss(self, batch: Batch, output: MTPOutput, ce_per_head: Tensor) -> Tensor | None:
        """[]: what the value head learns from."""
        return None

    # ---- set-up ----

    def setup(self) -> None:
        """Build model, optimiser and schedule from the seed, or load the newest checkpoint.

        Raises:
            ConfigError: the batch does not divide among the processes, or the reference has
                several heads.
        """
        config = self.config
        set_seed(config.seed)
        # Precision is not accelerate's here: it ends with the model, before the loss's products.
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=not torch.accelerator.is_available(),
            step_scheduler_with_optimizer=False,
        )
        if config.batch_size % self.accelerator.num_processes:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide among "
                f"{self.accelerator.num_processes} processes: make it a multiple"
            )
        model = MTPTransformer(config.model_config(self.data.train.vocab_size))
        value_head = self.build_value_head()
        self.warmup_steps = 0 if value_head is None else config.value_warmup_steps
        optimizer, scheduler = build_optimizer(config, model, value_head, self.warmup_steps)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        self.value_head: Any = value_head and self.accelerator.prepare(value_head)
        if self.reference is not None:
            self.reference = prepare_reference(self.reference, self.accelerator.device, config.loss)
        self._resume()

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.remove_leftovers()
        self.accelerator.wait_for_everyone()
        checkpoint = self.folder.latest_checkpoint()
        if checkpoint is not None:
            self.step, path = checkpoint
            self.accelerator.load_state(str(path))
            progress = json.loads((path / "progress.json").read_text())
            self.evaluation_at_start = progress["evaluation_at_start"]
        if self.accelerator.is_main_process:
            self.folder.cut_metrics_back(self.step)

    # ---- the loop ----

    @property
    def total_steps(self) -> int:
        """Of both stages together."""
        return self.warmup_steps + self.config.steps

    @property
    def stage(self) -> str:
        """Of the next step: "value_warmup", then "train"."""
        return VALUE_WARMUP if self.step < self.warmup_steps else TRAIN

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Train to the end, evaluate, save the final model.

        Args:
            on_step: is given each step's record, e.g. to show progress.

        Returns:
            The result, as in `result.json`.

        Raises:
            NonFiniteError: see there.
        """
        if self.evaluation_at_start is None:
            self.evaluation_at_start = self._evaluate()
        before = time.perf_counter()
        while self.step < self.total_steps:
            record = self.train_step(self._next_batch())
            now = time.perf_counter()
            record["tokens_per_s"] = self.config.batch_size * self.config.seq_len / (now - before)
            before = now
            if self.accelerator.is_main_process:
                self.folder.append_metrics(record)
                if on_step is not None:
                    on_step(record)
            if self.step % self.config.save_every == 0 or self.step == self.total_steps:
                self._save_checkpoint()
                before = time.perf_counter()
        return self._finish()

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One update on one batch, which is on the model's device.

        Returns:
            The step's record: step, stage, loss (in the warm-up the value head's), value_loss
            (critic-wmtp), ce_head_k, weight_head_k, weight_entropy, grad_norm, lr.

        Raises:
            NonFiniteError: a number of the record is NaN or infinite; nothing was updated.
        """
        stage, target_ids = self.stage, batch["target_ids"]
        with torch.set_grad_enabled(stage == TRAIN):
            with self.autocast():
                output = self.model(batch["input_ids"])
            arguments = self.loss_arguments(batch, output)
            with self.autocast():
                loss, _, ce_per_head = weighted_loss(
                    self.config.loss,
                    output.head_hidden_states,
                    self.accelerator.unwrap_model(self.model).unembed,
                    target_ids,
                    self._normalizer(target_ids),
                    **arguments,
                )
        ce_per_head = ce_per_head.detach()
        value_loss = self.value_loss(batch, output, ce_per_head)
        losses = {"loss": loss}
        if value_loss is not None:
            losses = {"loss": loss if stage == TRAIN else value_loss, "value_loss": value_loss}
        objective = value_loss if stage == VALUE_WARMUP else sum(losses.values())
        self.accelerator.backward(objective)
        weights = self.compute_head_weights(batch, ce_per_head, arguments)
        measured = {
            **losses,
            **step_statistics(ce_per_head, weights, target_ids),
            "grad_norm": self._clip_gradients(stage),
        }
        record = {"step": self.step + 1, "stage": stage, **self._read(measured), "lr": self._lr()}
        self._check_finite(record, batch)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return record

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast around a model and its loss, when the configuration says so."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def _next_batch(self) -> Batch:
        config, accelerator, stage = self.config, self.accelerator, self.stage
        batch = self.data.train.batch(
            self.step - (self.warmup_steps if stage == TRAIN else 0),
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            stream=STREAMS[stage],
        )
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        tensors = cast(dict[str, Tensor], batch)
        moved = {name: rows[mine].to(accelerator.device) for name, rows in tensors.items()}
        return cast(Batch, moved)

    def _normalizer(self, target_ids: Tensor) -> Tensor | None:
        """Processes average their gradients: each divides by the mean number of valid tokens."""
        if self.accelerator.num_processes == 1:
            return None
        count = has_target(target_ids, self.config.horizon).any(-1).sum().float()
        return self.accelerator.reduce(count, "mean").clamp(min=1)

    def _clip_gradients(self, stage: str) -> Tensor:
        """The norm of the gradient of what the stage trains; each module is clipped by itself."""
        limit = self.config.max_grad_norm
        norms = [
            self.accelerator.clip_grad_norm_(module.parameters(), limit)
            for module in (self.model, self.value_head)
            if module is not None
        ]
        return norms[0] if stage == TRAIN else norms[-1]

    def _read(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """The numbers, averaged over the processes, in one transfer from the device."""
        stacked = torch.stack([value.detach().float() for value in measured.values()])
        numbers = self.accelerator.reduce(stacked, "mean").tolist()
        return dict(zip(measured, numbers, strict=True))

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0 if self.stage == TRAIN else -1]["lr"])

    def _check_finite(self, record: dict[str, Any], batch: Batch) -> None:
        bad = {
            name: value
            for name, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        if bad:
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"step {record['step']}: {', '.join(f'{k} is {v}' for k, v in bad.items())}; "
                f"sequences {batch['sequence_ids'].tolist()} of the training data; nothing was "
                "updated: lower --lr, or look at these sequences"
            )

    # ---- what stays on disk ----

    def _evaluate(self) -> Evaluation:
        config = self.config
        batches = self.data.validation.evaluation_batches(
            config.eval_batches, batch_size=config.batch_size, seq_len=config.seq_len
        )
        model = self.accelerator.unwrap_model(self.model)
        with self.autocast():
            return evaluate(model, batches, self.accelerator.device)

    def _save_checkpoint(self) -> None:
        accelerator, folder = self.accelerator, self.folder
        path = folder.checkpoint_in_progress(self.step)
        if accelerator.is_main_process:
            folder.begin_checkpoint(self.step)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"step": self.step, "evaluation_at_start": self.evaluation_at_start}
            (path / "progress.json").write_text(json.dumps(progress))
            folder.commit_checkpoint(self.step, self.config.keep_last)

    def _save_final(self, path: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save_model_folder(model, self.data.tokenizer, path)
        if self.value_head is not None:
            value_head = self.accelerator.unwrap_model(self.value_head)
            save_model(value_head, str(path / "value_head.safetensors"))

    def _finish(self) -> dict[str, Any]:
        evaluation_at_end = self._evaluate()
        model = self.accelerator.unwrap_model(self.model)
        records = [r for r in self.folder.read_metrics() if r["stage"] == TRAIN]
        result = {
            "algo": self.config.algo,
            "steps": self.config.steps,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "device": str(self.accelerator.device),
            "start": self.evaluation_at_start,
            "end": evaluation_at_end,
            "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        }
        if self.accelerator.is_main_process:
            self.folder.write_folder("final", self._save_final)
            self.folder.write_result(result)
        self.accelerator.wait_for_everyone()
        return result
