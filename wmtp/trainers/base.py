"""The training loop, once: what differs between the algorithms is in their few methods.

A step is: model -> head weights, or what they are made from -> loss -> gradients -> finite? ->
update.
Batches are a function of (seed, step), so a run that resumes from a checkpoint walks the same path
as one that was never stopped.
"""

import abc
import contextlib
import functools
import operator
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from wmtp.data import Batch, PreparedData
from wmtp.labels import Targets
from wmtp.metrics import summarize
from wmtp.models import MTPOutput, MTPTransformer, ValueHead
from wmtp.reference import MTPLoss
from wmtp.trainers.config import ConfigError, TrainConfig
from wmtp.trainers.errors import StoppedError
from wmtp.trainers.evaluation import Evaluation, evaluate, step_statistics
from wmtp.trainers.hook import checked_weighting, own_code, what_weighs_nothing
from wmtp.trainers.kept_state import KeptState
from wmtp.trainers.losses import (
    OF_LABELS,
    OF_WEIGHTS,
    denominator,
    denominator_of_weights,
    training_loss,
)
from wmtp.trainers.optimizer import build_optimizer, multiply_gradients
from wmtp.trainers.processes import Processes
from wmtp.trainers.reference_model import Reference, prepare_reference
from wmtp.trainers.run_folder import RunFolder
from wmtp.trainers.settings import check_settings
from wmtp.trainers.step import (
    STREAMS,
    TRAIN,
    VALUE_WARMUP,
    NonFiniteError,
    Part,
    check_finite,
    micro_batches,
    on_device,
    targets_of,
    what_cancels,
    what_is_masked,
)
from wmtp.weightings import Uniform, Weighting


class BaseWmtpTrainer(KeptState, abc.ABC):
    """Trains an `MTPTransformer`; an algorithm is what it says in `compute_head_weights`.

    Attributes:
        needs_reference: whether it compares with a reference model.
        settings_type: a frozen dataclass of settings of the algorithm's own, in `self.settings`,
            which the command line takes as `--set name=value`.

    Example: the heads of hard tokens count more (focal loss, Lin et al. 2017).

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class FocalSettings:
        ...     focus: float = 2.0
        >>> class FocalTrainer(BaseWmtpTrainer):
        ...     settings_type = FocalSettings
        ...     def compute_head_weights(self, batch, output):
        ...         p = self.ce_per_head(batch, output).neg().exp()
        ...         return (1 - p) ** self.settings.focus

    Args:
        config: the settings.
        data: from `wmtp.data.prepare_data`.
        folder: opened already; what it holds of this run is continued.
        reference: for the algorithms that compare with one: an `MTPTransformer` of one head, or
            anything from input_ids [B, S] to logits.

    Raises:
        ConfigError: the algorithm needs a reference and got none, or has no such settings.
    """

    needs_reference: ClassVar[bool] = False
    settings_type: ClassVar[type[Any] | None] = None

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
        self.settings: Any = check_settings(self.settings_type, config.settings)
        self.data = data
        self.folder = folder
        self.reference: Any = reference
        self.step = 0  # steps done, the value head's warm-up included
        self.evaluation_at_start: Evaluation | None = None
        self._evaluated: Evaluation | None = None  # after the last step

    # ---- what an algorithm may say ----

    def build_value_head(self) -> ValueHead | None:
        """A value head to train beside the model."""
        return None

    @abc.abstractmethod
    def compute_head_weights(self, batch: Batch, output: MTPOutput) -> Tensor | Weighting:
        """What the step trains with, and records.

        Args:
            batch: `input_ids` [B, S], `target_ids` [B, T] and what else `Batch` names, of this
                process.
            output: of the model; `self.ce_per_head(batch, output)` has its cross entropies.

        Returns:
            Weights [B, S, H], >= 0, or what the loss forms them from: `Uniform`, `Given`, `Excess`.
        """

    def ce_per_head(self, batch: Batch, output: MTPOutput) -> Tensor:
        """The model's cross entropies [B, S, H] in nats, without gradient, for weights that are
        made from them. One more product of all hidden states with the unembedding."""
        with torch.no_grad():
            return self._loss(batch, output, Uniform()).ce_per_head

    def value_loss(self, batch: Batch, hidden_states: Tensor, ce_per_head: Tensor) -> Tensor | None:
        """[]: what the value head learns from, of hidden_states [B, S, D] and ce [B, S, H]."""
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
        self.processes = Processes(self.accelerator)
        parts = self.processes.count * config.grad_accum
        # The loss is divided by what others of the step's batch have to be asked for.
        self.in_parts = parts > 1
        if config.batch_size % parts:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide among "
                f"{self.processes.count} processes and {config.grad_accum} parts of a "
                f"step: make it a multiple of {parts}"
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

    # ---- the loop ----

    @property
    def total_steps(self) -> int:
        """Of both stages together."""
        return self.warmup_steps + self.config.steps

    @property
    def stage(self) -> str:
        """Of the next step: "value_warmup", then "train"."""
        return VALUE_WARMUP if self.step < self.warmup_steps else TRAIN

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train to the end, evaluate, save the final model.

        Args:
            on_step: is given each step's record, e.g. to show progress.
            stop_asked: is asked after each step, by every process.

        Returns:
            The result, as in `result.json`.

        Raises:
            NonFiniteError: see there.
            StoppedError: some process was asked to stop; the state is saved.
            FileError: something cannot be written; the last checkpoint is whole.
        """
        if self.evaluation_at_start is None:
            self.evaluation_at_start = self._evaluate()
        before = time.perf_counter()
        while self.step < self.total_steps:
            record = self.train_step(self._next_batch())
            seconds = time.perf_counter() - before
            record["tokens_per_s"] = self.config.batch_size * self.config.seq_len / seconds
            record |= self._evaluation_of_step()
            if self.accelerator.is_main_process:
                self.folder.append_metrics(record)
                if on_step is not None:
                    on_step(record)
            stop = self.processes.any(stop_asked())
            if stop or self.step % self.config.save_every == 0 or self.step == self.total_steps:
                self._save_checkpoint()
            if stop:
                raise StoppedError(f"stopped after step {self.step} of {self.total_steps}")
            before = time.perf_counter()
        return self._finish(self._evaluated or self._evaluate())

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One update on one batch, which is on the model's device.

        Returns:
            The step's record: step, stage, loss (in the warm-up the value head's), value_loss
            (critic-wmtp), those of `step_statistics`, grad_norm, lr.

        Raises:
            NonFiniteError: a number of the record is NaN or infinite; nothing was updated.
            WeightsError: `compute_head_weights` returned what is no weighting.
        """
        stage = self.stage
        parts = micro_batches(batch, self.config.grad_accum)
        normalizer = self._normalizer(batch)
        done = [self._backward(part, stage, normalizer, part is parts[-1]) for part in parts]
        hidden_states, ce_per_head, weights = (
            torch.cat([getattr(each, name) for each in done])
            for name in ("hidden_states", "ce_per_head", "weights")
        )
        losses = {"loss": self._whole_loss(done)}
        value_loss = self.value_loss(batch, hidden_states, ce_per_head)
        if value_loss is not None:
            self.accelerator.backward(value_loss)
            losses = {"loss": losses["loss"] if stage == TRAIN else value_loss}
            losses["value_loss"] = value_loss
        measured = {
            **losses,
            **step_statistics(
                functools.reduce(operator.add, (part.summary for part in done)),
                weights,
                self.targets(batch).valid(),
                self.processes.total,
            ),
            "grad_norm": self._clip_gradients(stage),
        }
        record = {
            "step": self.step + 1,
            "stage": stage,
            **self.processes.means(measured),
            "lr": self._lr(),
        }
        self.processes.note(what_is_masked(record))
        self.processes.note(what_weighs_nothing(record, self.config.algo))
        try:
            check_finite(record, batch["sequence_ids"])
        except NonFiniteError:
            self.optimizer.zero_grad()
            raise
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return record

    def _backward(
        self, part: Batch, stage: str, normalizer: Tensor | float | None, last: bool
    ) -> Part:
        """The loss of a micro-batch, undivided where there are others, and its gradients."""
        sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with sync, torch.set_grad_enabled(stage == TRAIN):
            with self.autocast():
                output = self.model(part["input_ids"], part.get("document_ids"))
            weighting = self._weighting(part, output)
            self.processes.note(what_cancels(weighting, self.config))
            result = self._loss(part, output, weighting, normalizer, metrics=True)
            if stage == TRAIN:
                self.accelerator.backward(result.loss)
        assert result.metrics is not None
        weights = result.metrics.weights
        divisor = denominator_of_weights(
            weighting, weights, self.targets(part), self.config.reduction
        )
        ce_per_head, hidden_states = result.ce_per_head.detach(), output.hidden_states.detach()
        of_loss = (summarize(result), result.loss.detach(), divisor)
        return Part(hidden_states, ce_per_head, weights, *of_loss)

    def _normalizer(self, batch: Batch) -> Tensor | float | None:
        """What the losses of a step's parts are divided by: what labels tell of the whole step;
        where it follows from the weights 1, and their sum is divided."""
        if not self.in_parts:
            return None
        if self.config.reduction not in OF_LABELS:
            return 1.0
        targets = self.targets(batch)
        return self.processes.total(denominator(Uniform(), targets, self.config.reduction))

    def targets(self, batch: Batch) -> Targets:
        """What the heads are asked for."""
        return targets_of(batch, self.config.horizon)

    def _weighting(self, batch: Batch, output: MTPOutput) -> Weighting:
        algo, step = self.config.algo, self.step + 1
        with own_code(algo, step):
            returned = self.compute_head_weights(batch, output)
        name, states = type(self).__name__, output.head_hidden_states
        where = f"step {step}, {algo}"
        return checked_weighting(returned, name, states, self.targets(batch), where)

    def _whole_loss(self, parts: list[Part]) -> Tensor:
        """The step's loss; its gradients are divided as it is."""
        loss = torch.stack([part.loss for part in parts]).sum()
        if not self.in_parts:
            return loss
        divisors = torch.stack([part.denominator for part in parts])
        loss, divisor = self.processes.total(torch.stack((loss.double(), divisors.sum())))
        if self.config.reduction not in OF_WEIGHTS or divisor == 0:  # nothing weighs
            divisor = torch.ones_like(divisor)
        # The processes' gradients are averaged.
        multiply_gradients(self.model, self.processes.count / divisor)
        return loss / divisor

    def _loss(
        self,
        batch: Batch,
        output: MTPOutput,
        weighting: Weighting,
        normalizer: Tensor | float | None = None,
        metrics: bool = False,
    ) -> MTPLoss:
        with self.autocast():
            return training_loss(
                self.config.loss,
                output.head_hidden_states,
                self.accelerator.unwrap_model(self.model).unembed,
                self.targets(batch),
                weighting,
                reduction=self.config.reduction,
                normalizer=normalizer,
                metrics=metrics,
            )

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
            rows=config.rows,
            seed=config.seed,
            stream=STREAMS[stage],
        )
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        return on_device(batch, accelerator.device, mine)

    def _clip_gradients(self, stage: str) -> Tensor:
        """The norm of the gradient of what the stage trains; each module is clipped by itself."""
        limit = self.config.max_grad_norm
        norms = [
            self.accelerator.clip_grad_norm_(module.parameters(), limit)
            for module in (self.model, self.value_head)
            if module is not None
        ]
        return norms[0] if stage == TRAIN else norms[-1]

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0 if self.stage == TRAIN else -1]["lr"])

    def _evaluation_of_step(self) -> dict[str, Any]:
        every, done = self.config.eval_every, self.step - self.warmup_steps
        if every and done > 0 and done % every == 0:
            self._evaluated = self._evaluate()
            return {"validation": self._evaluated}
        self._evaluated = None
        return {}

    def _evaluate(self) -> Evaluation:
        config = self.config
        batches = self.data.validation.evaluation_batches(
            config.eval_batches, batch_size=config.batch_size, rows=config.rows
        )
        model = self.accelerator.unwrap_model(self.model)
        with self.autocast():
            return evaluate(model, batches, self.accelerator.device)
