"""A run, whole: prepare, train step by step, save, verify, export; from the newest checkpoint if there is one."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from recognition import distributed, hardware
from recognition.config import Config
from recognition.data.index import check_trainable, open_index
from recognition.data.pipeline import Batch, Pipeline
from recognition.data.procedural.dataset import write_faces
from recognition.deploy.onnx import check_export, export
from recognition.distributed import Interrupt, ProcessInfo, failures
from recognition.distributed.turns import Turns
from recognition.errors import FailedElsewhere, UserError
from recognition.evaluation.verification import Verification
from recognition.files import lock
from recognition.head import ShardedSoftmax
from recognition.models.backbone import BackboneEmbedder, average_running_statistics, build_backbone, describe
from recognition.runs.checkpoint import Checkpoints
from recognition.runs.folder import Best, RunFolder
from recognition.runs.starting_point import start_from
from recognition.tracking import logs, progress
from recognition.tracking.tracker import Tracker
from recognition.training import resuming, summary
from recognition.training.loss_scale import LossScale
from recognition.training.optimizer import build_optimizer, optimizer_tensors
from recognition.training.update import Update, micro_batch_sizes
from recognition.training.verifying import open_on_ranks, verify_on_ranks

log = logging.getLogger(__name__)


def train(config: Config) -> bool:
    """Train from the newest checkpoint of `config.run.folder`, or from the start, to the last step.

    Every rank calls it. Returns whether the run is complete; it is not after an interruption, which leaves a
    checkpoint. Raises UserError for what the user can mend.
    """
    with progress.working("waiting for the other processes"):
        ranks = distributed.start(config.distributed, config.training.threads)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        stack.enter_context(failures.shared(ranks.store, ranks.rank, ranks.world))
        stack.enter_context(logs.telling(ranks.rank))
        interrupt = stack.enter_context(Interrupt())
        turns = Turns(ranks, config.distributed.init_timeout_seconds)
        folder = RunFolder(config.run.folder)
        turns.machines("making the run's folder", folder.create)
        turns.main("locking the run's folder", lambda: stack.enter_context(lock.held(folder.path)))
        trainer = stack.enter_context(contextlib.closing(Trainer(config, ranks, interrupt, folder, turns)))
        return trainer.run()


class Trainer:
    """A run in progress on one rank."""

    def __init__(
        self, config: Config, ranks: ProcessInfo, interrupt: Interrupt, folder: RunFolder, turns: Turns
    ) -> None:
        """`folder`: made, and held for this run alone."""
        self.ranks, self.interrupt, self.folder, self.turns, self.asked = ranks, interrupt, folder, turns, config
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        # What a run computes in, it goes on in: so its last checkpoint is looked at before anything is built.
        self.checkpoint = self.checkpoints.find()
        before = {} if self.checkpoint is None else self.checkpoints.facts(self.checkpoint)
        machines = distributed.gather_objects(hardware.of(ranks.device))
        self.resolved = hardware.resolve(
            config, hardware.weakest(machines), local_world=ranks.local_world, before=resuming.resolved(before)
        )
        self.config = config = self.resolved.config
        if config.faces is not None:
            faces = config.faces.model_dump()
            turns.machines("rendering faces", lambda: write_faces(config.data.path, **faces), shared=True)
        begun = str(before.get("fingerprint", ""))
        self.index = turns.machines("indexing", lambda: open_index(config.data.path, config.data.cache, going_on=begun))
        check_trainable(self.index)
        self.pair_sets = open_on_ranks(config, turns)
        self.sizes = micro_batch_sizes(config, ranks.world)
        self.step = int(before.get("step", 0))
        self.schedule, self.extension = resuming.schedule(config, self.index.num_images, before)
        if before:
            folder.check_resumable(before, self._facts())

        with progress.working("building the backbone"):
            self.backbone = build_backbone(config.backbone, config.run.seed)
        self.beginning = start_from(
            self.backbone, config.backbone, config.run.folder, goes_on=self.checkpoint is not None
        )
        if config.export.enabled:
            turns.main("trying the export", lambda: check_export(self.backbone, config.export))
        self.backbone.to(ranks.device)
        scaled = config.backbone.precision == "float16"
        self.loss_scale = LossScale(config.training, ranks.head_device, enabled=scaled)
        self.head_group = None
        if config.distributed.head_group:
            self.head_group = distributed.new_group(config.distributed.init_timeout_seconds)
        self.head = ShardedSoftmax(
            config.head,
            self.index.num_identities,
            config.backbone.embedding_size,
            seed=config.run.seed,
            device=ranks.head_device,
            optimizer=config.head_optimizer,
            ranks_group=self.head_group,
            # In float16 a step may be called off by the backbone's gradient, so the rows wait for it.
            update_in_backward=config.training.accumulation == 1 and not scaled,
        )
        self.optimizer = build_optimizer(
            self.backbone, config.optimizer, decay_norms_and_biases=config.training.decay_norms_and_biases
        )
        self.update = Update(
            config,
            ranks,
            backbone=self.backbone,
            head=self.head,
            optimizer=self.optimizer,
            loss_scale=self.loss_scale,
            sizes=self.sizes,
        )
        if self.checkpoint is not None:
            with progress.working("loading the checkpoint"):
                self.checkpoints.load(self.checkpoint, self._tensors())
            self.loss_scale.load(before.get("loss_scale", {}))
        turns.main("beginning", self._begin)
        self.best = Best(folder)
        self.tracker = Tracker(
            folder.path,
            config.tracking,
            total_steps=self.schedule.total_steps,
            start_step=self.step,
            images_per_step=config.training.global_batch,
            steps_per_epoch=self.index.num_images / config.training.global_batch,
            is_main=ranks.is_main,
            every=self._pauses(),
        )
        with progress.working("building the image pipeline"):
            self.pipeline = Pipeline(
                self.index,
                config.data,
                seed=config.run.seed,
                batch=sum(self.sizes),
                rank=ranks.rank,
                world=ranks.world,
                device=ranks.device,
                image_size=config.backbone.image_size,
                channels_last=config.backbone.channels_last is True,
                start_step=self.step * config.training.accumulation,
                quarantine=folder.quarantine,
            )
        self.batches = self._shown(self.pipeline)

    def run(self) -> bool:
        """Train until the last step or an interruption; returns whether the run is complete."""
        self._announce()
        first = self.step
        try:
            if not self._train():
                self.tracker.note(f"interrupted: checkpoint at step {self.step}; the same command goes on from there")
                return False
            self._complete(trained=self.step > first)
            return True
        except FailedElsewhere:
            raise
        except UserError as error:
            self._say_if_again(error, first)
            raise
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise UserError(self._who_hangs()) from error

    def close(self) -> None:
        """Release the pipeline and the files."""
        self.pipeline.close()
        self.tracker.close()

    def _pauses(self) -> dict[str, Sequence[int]]:
        """Steps at whose multiples there are checkpoints and verifications, each of which follows a checkpoint."""
        saving, verification = self.config.checkpoint.every_steps, self.config.evaluation.every_steps
        if not self.pair_sets:
            return {"saving": (saving,)}
        return {"saving": (saving, verification), "verification": (verification,)}

    def _begin(self) -> None:
        """Put the folder in order for this run, on the main rank: nothing speaks against it any more."""
        if self.step == 0 and (aside := self.folder.set_aside()):
            log.warning("%s: what an earlier attempt left is in %s now", self.folder.path, aside.name)
        self.folder.refuse_folders()
        self.folder.save_config(self.asked)
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())
        self.folder.warn_of_room(size, self.config.checkpoint.keep)

    def _train(self) -> bool:
        """Train; returns whether the last step was reached, of which there is a checkpoint then."""
        config, total, first = self.config, self.schedule.total_steps, self.step
        beginning = "first step, which compiles the backbone" if config.backbone.compile else "first step"
        while self.step < total:
            with progress.working(beginning) if self.step == first else contextlib.nullcontext():
                values = self._train_step(self.step)
            self.step += 1
            if self.step == first + 1:
                self._bound_collectives(config.distributed.timeout_seconds)
            is_record = _is_due(self.step, config.tracking.every_steps, total)
            self.tracker.log_step(self.step, values)
            if is_record:
                self._stop_if_not_finite()
            # A GPU is not made to wait for the ranks' agreement more often than for a record.
            stop = (is_record or self.ranks.device.type == "cpu") and distributed.any_rank(self.interrupt.requested)
            verifies = _is_due(self.step, config.evaluation.every_steps, total) and bool(self.pair_sets)
            # First the checkpoint: what follows may fail.
            if verifies or stop or _is_due(self.step, config.checkpoint.every_steps, total):
                self._save()
            if verifies and self.step < total:
                with self._after_saving("verification"):
                    self._verify()
            if stop and self.step < total:
                return False
        return True

    def _complete(self, *, trained: bool) -> None:
        """Verify and export what the last step left, as far as an earlier attempt has not done so."""
        numbers = self.folder.final_verification(self.step)
        lacks_results = any(pairs.name not in numbers for pairs in self.pair_sets)
        exports = self.config.export.enabled and (trained or not self.folder.has_model_of(self.step))
        # What one rank sees of the folder decides for all.
        lacks_results, exports = distributed.broadcast_object((lacks_results or trained, exports))
        if not (trained or lacks_results or exports):
            self.tracker.note(f"complete: all {self.step:,} steps are done, nothing to do{_listed(numbers)}")
            self.tracker.note(
                "to go on: more training.epochs with training.extend=stretch or training.extend=restart, or another "
                f"run with run.folder=... and backbone.weights={self.folder.path}"
            )
            return
        if lacks_results:
            with self._after_saving("verification"):
                numbers = {name: result.to_json() for name, result in self._verify().items()}
            if self.ranks.is_main:
                self.folder.keep_final_verification(self.step, numbers)
        if exports:
            with self._after_saving("export"):
                self._export(numbers)
        self._summarise({name: result["accuracy"] for name, result in numbers.items()})

    @contextlib.contextmanager
    def _after_saving(self, what: str) -> Iterator[None]:
        """Have an error say that the training is not lost."""
        try:
            yield
        except Exception as error:
            saved = (
                f"The training is not lost: {self.folder.checkpoints} holds a checkpoint of step {self.step}, from "
                "which the same command goes on; evaluation.* and export.* may be changed"
            )
            if isinstance(error, UserError):
                raise UserError(f"{what} at step {self.step}: {error}\n{saved}") from error
            error.add_note(saved)
            raise

    def _say_if_again(self, error: UserError, first: int) -> None:
        """Note the error, and have it say whether the attempt before, from the same step on, failed too."""
        error.args = (f"{error}{self.folder.note_failure(first, self.step, str(error))}",)

    def _who_hangs(self) -> str:
        seconds = self.config.distributed.timeout_seconds
        missing = ", ".join(str(rank) for rank in distributed.absent(self.ranks)) or "?"
        return (
            f"step {self.step}: rank {missing} has not taken part for {seconds} seconds (distributed.timeout_seconds). "
            f"Look whether its disk or network hangs where it reads {self.config.data.path}; the same command goes on "
            "from the last checkpoint"
        )

    def _shown(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, of which the first is recorded."""
        for batch in batches:
            self.tracker.images("first batch", batch.images, 0)
            yield batch

    def _train_step(self, step: int) -> dict[str, Tensor | float]:
        """One update from one global batch; returns what is recorded of it, on the device."""
        return self.update(step, self.batches, self.schedule)

    def _stop_if_not_finite(self) -> None:
        in_a_row = self.update.warn_if_not_finite(self.step)
        if in_a_row >= self.config.training.max_nonfinite_steps:
            saved = any(self.folder.checkpoints.glob("step-*"))
            along = f" and backbone.weights={self.folder.path}" if saved else ""
            low = [name for name in ("backbone", "head") if getattr(self.config, name).precision != "float32"]
            higher = " and ".join(f"{name}.precision=float32" for name in low)
            raise UserError(
                f"step {self.step}: the loss has not been finite for {in_a_row} steps. The backbone's weights are "
                f"those of step {self.step - in_a_row}; {self.folder.path / 'metrics.jsonl'} tells where it began. "
                f"Start another run with run.folder=...{along}, with a lower optimizer.lr or a longer "
                f"training.warmup_epochs{f'; or go on with {higher}' if higher else ''}"
            )

    def _verify(self) -> dict[str, Verification]:
        """Verify on every set, its images split over the ranks; keep the backbone if it is the best so far."""
        results: dict[str, Verification] = {}
        with self.tracker.pause("verification"):
            average_running_statistics(self.backbone)
            embedder = BackboneEmbedder(self.backbone, self.ranks.device, float32=True)
            for pairs in self.pair_sets:
                result = verify_on_ranks(
                    embedder, pairs, self.turns, self.config.evaluation.batch, self.config.data.fit
                )
                results[pairs.name] = result
                self.tracker.verification(self.step, pairs.name, result.to_json(), result.scores)
            if results and self.ranks.is_main:
                accuracy = sum(result.accuracy for result in results.values()) / len(results)
                self.best.offer(self.backbone, self.step, accuracy)
        return results

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, sharing storage with what is trained."""
        parts = {
            "backbone": self.backbone.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.backbone),
            "head": self.head.state_dict_tensors(),
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _save(self) -> None:
        with self.tracker.pause("saving"), progress.working("saving a checkpoint"):
            average_running_statistics(self.backbone)
            self.checkpoints.save(self.step, self._tensors(), self._facts() | {"loss_scale": self.loss_scale.state()})
            self.best.write()

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": json.loads(self.asked.model_dump_json()),
            "resolved": self.resolved.facts(),
            "schedule_offset": self.schedule.offset,
            "fingerprint": self.index.fingerprint,
            "images": self.index.num_images,
            "identities": self.index.num_identities,
        }

    def _bound_collectives(self, seconds: float) -> None:
        distributed.set_timeout(seconds)
        if self.head_group is not None:
            distributed.set_timeout(seconds, self.head_group)

    def _export(self, verification: dict[str, dict[str, Any]]) -> None:
        """Write the deployable and its card on the main rank; a failure there stops every rank."""
        facts = {name: value for name, value in self._facts().items() if name not in ("config", "schedule_offset")}
        facts |= {"backbone": self.config.backbone.name, "loss": self.config.head.loss.name}
        facts["verification"] = verification
        self.turns.main("export", lambda: export(self.backbone, self.folder.model, facts, self.config.export))

    def _announce(self) -> None:
        self.tracker.configuration(self.config)
        backbone = describe(self.backbone, self.config.backbone), *self.beginning
        lines = summary.opening(self.config, self.resolved, self.index, self.tracker, self.ranks.world, backbone)
        for text in (*lines, *self.extension):
            self.tracker.note(text)
        for text in self.index.notes:
            self.tracker.warn(f"data.path: {text}")
        for text in self.resolved.notes:
            self.tracker.warn(text)
        for pairs in self.pair_sets:
            self.tracker.note(pairs.taken)
            for doubt in pairs.doubts:
                self.tracker.warn(f"{pairs.name}: {doubt}")

    def _summarise(self, accuracies: dict[str, float]) -> None:
        nonfinite = int(self.update.nonfinite)
        self.tracker.results(accuracies)
        self.tracker.block(summary.closing(self.config, self.folder, self.tracker, accuracies, nonfinite=nonfinite))


def _is_due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _listed(numbers: dict[str, dict[str, Any]]) -> str:
    """Final accuracies in words."""
    found = ", ".join(f"{name}: accuracy {result['accuracy']:.2%}" for name, result in numbers.items())
    return f" ({found})" if found else ""
