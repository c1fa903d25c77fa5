"""What of a trainer stays on disk, and how it goes on from there."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from wmtp.data import PreparedData
from wmtp.files import FileError, writing
from wmtp.models.storage import save_model_folder
from wmtp.trainers.config import TrainConfig
from wmtp.trainers.evaluation import Evaluation, run_result
from wmtp.trainers.optimizer import state_bytes
from wmtp.trainers.run_folder import FREE_SPACE, RunFolder


class KeptState:
    """The part of a trainer that saves and resumes; what it reads and sets is the trainer's."""

    config: TrainConfig
    data: PreparedData
    folder: RunFolder
    accelerator: Accelerator
    model: Any
    value_head: Any
    optimizer: Any
    step: int
    evaluation_at_start: Evaluation | None

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.remove_leftovers()
        self.accelerator.wait_for_everyone()
        checkpoint, complaints = self.folder.newest_whole()
        if checkpoint is not None:
            self.step, path = checkpoint
            for complaint in complaints:
                self.accelerator.print(f"{complaint}: going on from {path}", file=sys.stderr)
            self.accelerator.load_state(str(path))
            progress = json.loads((path / "progress.json").read_text())
            self.evaluation_at_start = progress["evaluation_at_start"]
        if self.accelerator.is_main_process:
            lost = self.folder.cut_metrics_back(checkpoint)
            if lost is not None and checkpoint is not None:
                print(f"{lost}: going on from {checkpoint[1]}, which has them", file=sys.stderr)

    def _save_checkpoint(self) -> None:
        path = self.folder.checkpoints.in_progress(self.step)
        try:
            size = state_bytes(self.optimizer, self.model, self.value_head)
            with writing(path, FREE_SPACE, size):
                self._write_checkpoint(path)
        except FileError:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def _write_checkpoint(self, path: Path) -> None:
        accelerator, folder = self.accelerator, self.folder
        if accelerator.is_main_process:
            folder.checkpoints.begin(self.step)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"step": self.step, "evaluation_at_start": self.evaluation_at_start}
            (path / "progress.json").write_text(json.dumps(progress))
            folder.commit_checkpoint(self.step)
            self._manage_checkpoints()

    def _manage_checkpoints(self) -> None:
        """Keep the newest `keep_last`."""
        self.folder.checkpoints.drop_old(self.config.keep_last, self.step)

    def _save_final_checkpoint(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        value_head = self.value_head and self.accelerator.unwrap_model(self.value_head)
        tokenizer, run = self.data.tokenizer, self.folder.run
        self.folder.write_folder(
            "final", lambda path: save_model_folder(model, tokenizer, path, value_head, run)
        )

    def _finish(self, end: Evaluation) -> dict[str, Any]:
        ends = {"start": self.evaluation_at_start, "end": end}
        model = self.accelerator.unwrap_model(self.model)
        result = run_result(
            self.config, model, self.accelerator.device, self.folder.read_metrics(), ends
        )
        if self.accelerator.is_main_process:
            self._save_final_checkpoint()
            self.folder.write_result(result, self.step)
        self.accelerator.wait_for_everyone()
        return result
