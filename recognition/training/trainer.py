"""A whole run: prepare, train step by step, save, verify, export; from the newest checkpoint if there is one."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from recognition import distributed, hardware
from recognition.config import Config
from recognition.data.index import check_trainable, open_index
from recognition.data.pipeline import Batch, Pipeline
from recognition.data.procedural.dataset import write_faces
from recognition.deploy.export import check_export, export_onnx
from recognition.distributed import Interrupt, ProcessInfo, failures
from recognition.distributed.coordinator import Coordinator
from recognition.errors import FailedElsewhere, UserError
from recognition.evaluation.verification import Verification
from recognition.files import lock
from recognition.head import ShardedSoftmax
from recognition.models.backbone import BackboneEmbedder, average_running_statistics, build_backbone, describe
from recognition.runs import faults
from recognition.runs.best import BestBackbone
from recognition.runs.checkpoint import Checkpoints
from recognition.runs.folder import RunFolder
from recognition.runs.metadata import RunMetadata, check_resumable, recorded_precisions
from recognition.runs.starting_point import start_from
from recognition.tracking import clock, logs, progress
from recognition.tracking.tracker import Tracker
from recognition.training import messages
from recognition.training.loss_scale import LossScale
from recognition.training.optimizer import build_optimizer, optimizer_tensors
from recognition.training.schedule import plan_schedule
from recognition.training.update import Update, micro_batch_sizes
from recognition.training.verifying import open_on_ranks, verify_on_ranks

log = logging.getLogger(__name__)


def train(config: Config) -> bool:
    """Train from the newest checkpoint of `config.run.folder`, or from the start, to the last step.

    Every rank calls it. Returns whether the run is complete; it is not after an interruption, which leaves a
    checkpoint. Raises UserError for what the user can mend.
    """
    with progress.task("waiting for the other processes"):
        ranks = distributed.start(config.distributed, config.training.threads)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        stack.enter_context(failures.shared(ranks.store, ranks.rank, ranks.world))
        stack.enter_context(logs.setup_logging(ranks.rank))
        interrupt = stack.enter_context(Interrupt())
        coordinator = Coordinator(ranks, config.distributed.init_timeout_seconds)
        folder = RunFolder(config.run.folder)
        coordinator.local_first("making the run's folder", folder.create)
        coordinator.on_main("locking the run's folder", lambda: stack.enter_context(lock.held(folder.path)))
        trainer = stack.enter_context(contextlib.closing(Trainer(config, ranks, interrupt, folder, coordinator)))
        return trainer.run()


class Trainer:
    """A run in progress on one rank.

    The order of its preparation matters:

    1. The newest checkpoint is found first, as a run goes on in the precision that it began in.
    2. `_prepare_data`: faces are rendered before they are indexed. Index, verification sets, batch and settings are
       checked before anything large is built, so that mistakes show within seconds.
    3. `_build`: the weights to start from are loaded, and the export is tried, while the backbone is on the CPU. The
       optimizer lays its state out as the parameters are, so it comes after the backbone has moved to its device.
    4. `_resume`: a checkpoint is loaded in place, so after all tensors that it fills exist. Then every check has
       passed: the run's settings are written, and the tracker drops the records beyond the checkpoint's
       step. The pipeline comes last, as it reads ahead from that step on.
    """

    def __init__(
        self, config: Config, ranks: ProcessInfo, interrupt: Interrupt, folder: RunFolder, coordinator: Coordinator
    ) -> None:
        """Prepare the run. `folder` has been created, and locked for this run."""
        self.ranks, self.interrupt, self.folder, self.coordinator = ranks, interrupt, folder, coordinator
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        self.checkpoint = self.checkpoints.find()
        previous = {} if self.checkpoint is None else self.checkpoints.metadata(self.checkpoint)
        self.step = int(previous.get("step", 0))
        """Number of updates done."""
        machines = distributed.gather_objects(hardware.detect(ranks.device))
        self.resolved = hardware.resolve(
            config,
            hardware.weakest(machines),
            local_world=ranks.local_world,
            before=recorded_precisions(previous),
        )
        self.config = self.resolved.config
        self._prepare_data(config, previous)
        self._build()
        self._resume(config, previous)

    def _prepare_data(self, asked: Config, previous: dict[str, Any]) -> None:
        """Open the index and the verification sets, and check that the run goes on as its checkpoint began.

        `asked`: the settings with every `auto`. `previous`: the checkpoint's metadata, empty without one.
        """
        config = self.config
        if config.faces is not None:
            faces = config.faces.model_dump()
            self.coordinator.local_first("rendering faces", lambda: write_faces(config.data.path, **faces), shared=True)
        fingerprint = str(previous.get("fingerprint", ""))
        self.index = self.coordinator.local_first(
            "indexing", lambda: open_index(config.data.path, config.data.index_folder, resumed_fingerprint=fingerprint)
        )
        check_trainable(self.index)
        self.pair_sets = open_on_ranks(config, self.coordinator)
        self.sizes = micro_batch_sizes(config, self.ranks.world)
        self.schedule, self.schedule_notes = plan_schedule(config, self.index.num_images, previous)
        self.metadata = RunMetadata(
            config=asked,
            resolved=self.resolved.to_json(),
            schedule_offset=self.schedule.offset,
            fingerprint=self.index.fingerprint,
            images=self.index.num_images,
            identities=self.index.num_identities,
        )
        if previous:
            check_resumable(self.folder.path, previous, self.metadata.to_json(self.step))

    def _build(self) -> None:
        """Build everything that is trained, and the update that trains it."""
        config, ranks = self.config, self.ranks
        with progress.task("building the backbone"):
            self.backbone = build_backbone(config.backbone, config.run.seed)
        self.weights_notes = start_from(
            self.backbone, config.backbone, config.run.folder, goes_on=self.checkpoint is not None
        )
        if config.export.enabled:
            self.coordinator.on_main("trying the export", lambda: check_export(self.backbone, config.export))
        self.backbone.to(ranks.device)
        scaled = config.backbone.precision == "float16"
        self.loss_scale = LossScale(config.training, ranks.head_device, enabled=scaled)
        self.head = ShardedSoftmax(
            config.head,
            self.index.num_identities,
            config.backbone.embedding_size,
            seed=config.run.seed,
            device=ranks.head_device,
            optimizer=config.head_optimizer,
            # In float16 a step may be skipped for the backbone's gradient, so the rows wait for it.
            update_in_backward=config.training.accumulation_steps == 1 and not scaled,
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

    def _resume(self, asked: Config, previous: dict[str, Any]) -> None:
        """Load the checkpoint, if there is one, and start the tracker and the data pipeline at its step."""
        config, ranks = self.config, self.ranks
        if self.checkpoint is not None:
            with progress.task("loading the checkpoint"):
                self.checkpoints.load(self.checkpoint, self.state_tensors())
            self.loss_scale.load(previous.get("loss_scale", {}))
        self.coordinator.on_main("beginning", lambda: self._prepare_folder(asked))
        self.best = BestBackbone(self.folder.path)
        self.tracker = Tracker(
            self.folder.path,
            config.tracking,
            total_steps=self.schedule.total_steps,
            start_step=self.step,
            images_per_step=config.training.global_batch,
            steps_per_epoch=self.index.num_images / config.training.global_batch,
            is_main=ranks.is_main,
            every=clock.pause_intervals(
                config.checkpoint.every_steps, config.evaluation.every_steps if self.pair_sets else None
            ),
        )
        with progress.task("building the image pipeline"):
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
                start_step=self.step * config.training.accumulation_steps,
                quarantine=self.folder.quarantine,
            )
        self.batches = self._read_batches()

    def _prepare_folder(self, asked: Config) -> None:
        """Put the folder in order for this run, on the main rank."""
        if self.step == 0 and (earlier := self.folder.move_earlier_files()):
            log.warning("%s: what an earlier attempt left is in %s now", self.folder.path, earlier.name)
        self.folder.refuse_folders()
        self.folder.save_config(asked)
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.state_tensors().values())
        self.folder.warn_of_room(size, self.config.checkpoint.keep)

    def run(self) -> bool:
        """Train until the last step or an interruption; returns whether the run is complete."""
        self._log_summary()
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
            # A second failure from the same step adds that repeating the command will not help.
            error.args = (f"{error}{self.folder.note_failure(first, self.step, str(error))}",)
            raise
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            missing = distributed.missing_ranks(self.ranks)
            raise UserError(messages.rank_hangs(self.config, self.step, missing)) from error

    def close(self) -> None:
        """Release the pipeline and the files."""
        self.pipeline.close()
        self.tracker.close()

    def _train(self) -> bool:
        """Train; return whether the last step was reached, in which case its checkpoint has been written."""
        config, total, first = self.config, self.schedule.total_steps, self.step
        beginning = "first step, which compiles the backbone" if config.backbone.compile else "first step"
        while self.step < total:
            faults.reach("step", step=self.step, trainer=self)
            with progress.task(beginning) if self.step == first else contextlib.nullcontext():
                metrics = self.update(self.step, self.batches, self.schedule)
            self.step += 1
            faults.reach("step done", step=self.step, trainer=self)
            if self.step == first + 1:
                self._set_collective_timeout(config.distributed.timeout_seconds)
            is_record = _is_due(self.step, config.tracking.every_steps, total)
            self.tracker.log_step(self.step, metrics.to_dict())
            if is_record:
                self._stop_if_not_finite()
            # A GPU is not made to wait for the ranks' agreement more often than for a record.
            stop = (is_record or self.ranks.device.type == "cpu") and distributed.any_rank(self.interrupt.requested)
            verifies = _is_due(self.step, config.evaluation.every_steps, total) and bool(self.pair_sets)
            # The checkpoint comes first, as verification may fail.
            if verifies or stop or _is_due(self.step, config.checkpoint.every_steps, total):
                self._save()
            if verifies and self.step < total:
                with self._after_saving("verification"):
                    self._verify()
            if stop and self.step < total:
                return False
        return True

    def _complete(self, *, trained: bool) -> None:
        """Verify and export the backbone of the last step, as far as an earlier attempt has not done so."""
        results = self.folder.final_verification(self.step)
        lacks_results = any(pairs.name not in results for pairs in self.pair_sets)
        exports = self.config.export.enabled and (trained or not self.folder.has_model_of(self.step))
        # What one rank sees of the folder decides for all.
        lacks_results, exports = distributed.broadcast_object((lacks_results or trained, exports))
        if not (trained or lacks_results or exports):
            for text in messages.nothing_to_do(self.folder, self.step, results):
                self.tracker.note(text)
            return
        if lacks_results:
            with self._after_saving("verification"):
                results = {name: result.to_json() for name, result in self._verify().items()}
            if self.ranks.is_main:
                self.folder.save_final_verification(self.step, results)
        if exports:
            with self._after_saving("export"):
                self._export(results)
        self._log_results({name: result["accuracy"] for name, result in results.items()})

    @contextlib.contextmanager
    def _after_saving(self, what: str) -> Iterator[None]:
        """Add to an error in the block the note that the training is not lost."""
        try:
            yield
        except Exception as error:
            saved = messages.training_is_saved(self.folder, self.step)
            if isinstance(error, UserError):
                raise UserError(f"{what} at step {self.step}: {error}\n{saved}") from error
            error.add_note(saved)
            raise

    def _read_batches(self) -> Iterator[Batch]:
        """Yield the pipeline's batches: the wait for each is measured, the images of the first are recorded."""
        while True:
            with self.tracker.clock.data_wait():
                batch = next(self.pipeline)
            self.tracker.log_images("first batch", batch.images, 0)
            faults.reach("batch", step=self.step, trainer=self, batch=batch)
            yield batch

    def _stop_if_not_finite(self) -> None:
        in_a_row = self.update.warn_if_not_finite(self.step)
        if in_a_row >= self.config.training.max_nonfinite_steps:
            raise UserError(messages.not_finite(self.config, self.folder, self.step, in_a_row))

    def _verify(self) -> dict[str, Verification]:
        """Verify on every set, its images split over the ranks; keep the backbone if it is the best so far."""
        results: dict[str, Verification] = {}
        with self.tracker.pause("verification"):
            average_running_statistics(self.backbone)
            faults.reach("verification", step=self.step, trainer=self)
            embedder = BackboneEmbedder(self.backbone, self.ranks.device, float32=True)
            for pairs in self.pair_sets:
                result = verify_on_ranks(
                    embedder, pairs, self.coordinator, self.config.evaluation.batch_per_rank, self.config.data.fit
                )
                results[pairs.name] = result
                self.tracker.log_verification(self.step, pairs.name, result.to_json(), result.scores)
            if results and self.ranks.is_main:
                accuracy = sum(result.accuracy for result in results.values()) / len(results)
                self.best.offer(self.backbone, self.step, accuracy)
        return results

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint holds, sharing storage with those that are trained."""
        parts = {
            "backbone": self.backbone.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.backbone),
            "head": self.head.state_dict_tensors(),
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _save(self) -> None:
        with self.tracker.saving(self.step), progress.task("saving a checkpoint"):
            average_running_statistics(self.backbone)
            metadata = self.metadata.to_json(self.step) | {"loss_scale": self.loss_scale.state()}
            self.checkpoints.save(self.step, self.state_tensors(), metadata)
            self.best.write()

    def _set_collective_timeout(self, seconds: float) -> None:
        distributed.set_timeout(seconds)

    def _export(self, results: dict[str, dict[str, Any]]) -> None:
        """Write the ONNX file and its card on the main rank; a failure there stops every rank."""
        faults.reach("export", step=self.step, trainer=self)
        card = self.metadata.card(self.step) | {"verification": results}
        self.coordinator.on_main(
            "export", lambda: export_onnx(self.backbone, self.folder.model, card, self.config.export)
        )

    def _log_summary(self) -> None:
        """Log model, data and hardware of the run, and every warning about them."""
        self.tracker.log_config(self.config)
        backbone = describe(self.backbone, self.config.backbone), *self.weights_notes
        lines = messages.opening(self.config, self.resolved, self.index, self.tracker, self.ranks.world, backbone)
        for text in (*lines, *self.schedule_notes):
            self.tracker.note(text)
        for text in self.index.notes:
            self.tracker.warn(f"data.path: {text}")
        for text in self.resolved.notes:
            self.tracker.warn(text)
        for pairs in self.pair_sets:
            self.tracker.note(pairs.summary)
            for warning in pairs.warnings:
                self.tracker.warn(f"{pairs.name}: {warning}")

    def _log_results(self, accuracies: dict[str, float]) -> None:
        nonfinite = int(self.update.nonfinite)
        self.tracker.log_results(accuracies)
        self.tracker.block(messages.closing(self.config, self.folder, self.tracker, accuracies, nonfinite=nonfinite))


def _is_due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
