"""The loop: index, order, pipeline, backbone, head, loss; then back through the head's rows to the backbone."""

import contextlib
import inspect
import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recognition import distributed, failures, hardware
from recognition.checkpoint import Checkpoints
from recognition.config import Config, UserError
from recognition.config.base import FailedElsewhere
from recognition.data.faces import write_faces
from recognition.data.index import open_index
from recognition.data.pipeline import Pipeline
from recognition.deploy.onnx import export
from recognition.distributed import Interrupt, Ranks
from recognition.evaluation.pairs import PairSet, read_pairs
from recognition.evaluation.verification import Verification, check_pairs, embed_pairs, verify
from recognition.head import build_head
from recognition.loss_scale import LossScale
from recognition.models.backbone import BackboneEmbedder, average_running_statistics, build_backbone, seed_step
from recognition.optimizer import (
    Schedule,
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
    set_lr,
    step_if_finite,
)
from recognition.run_folder import RunFolder
from recognition.tracking import Tracker

log = logging.getLogger(__name__)
T = TypeVar("T")

# The argument has had another name since torch 2.15 or so, which warns of the old one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_RANKS_KEEP_THEIR_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def train(config: Config) -> bool:
    """Train from the newest checkpoint of `config.run.folder`, or from the start, to the last step.

    Every rank calls it. Returns whether the run is complete; it is not after an interruption, which leaves a
    checkpoint. Raises UserError for what the user can mend.
    """
    ranks = distributed.start(config.distributed, config.training.threads)
    try:
        with (
            failures.shared(ranks.store, ranks.rank, ranks.world),
            Interrupt() as interrupt,
            contextlib.closing(Trainer(config, ranks, interrupt)) as trainer,
        ):
            return trainer.run()
    finally:
        distributed.stop()


class Trainer:
    """A run in progress on one rank."""

    def __init__(self, config: Config, ranks: Ranks, interrupt: Interrupt) -> None:
        self.ranks, self.interrupt, self.asked = ranks, interrupt, config
        self.folder = RunFolder(config.run.folder)
        _local_main_first(ranks, self.folder.create)
        self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint.keep)
        # What a run computes in, it goes on in: so its last checkpoint is looked at before anything is built.
        self.checkpoint = self.checkpoints.find()
        before = {} if self.checkpoint is None else self.checkpoints.facts(self.checkpoint)
        machines = distributed.gather_objects(hardware.of(ranks.device))
        self.resolved = hardware.resolve(
            config, hardware.weakest(machines), local_world=ranks.local_world, before=_resolved(before)
        )
        self.config = config = self.resolved.config
        if config.faces is not None:
            faces = config.faces.model_dump()
            _local_main_first(ranks, lambda: write_faces(config.data.path, **faces))
        self.index = _local_main_first(ranks, lambda: open_index(config.data.path, config.data.cache))
        self.pair_sets = [read_pairs(path) for path in config.evaluation.pairs]
        for pairs in self.pair_sets:
            check_pairs(pairs, config.backbone.image_size)
        self.sizes = _micro_batch_sizes(config, ranks.world)
        self.schedule = Schedule.of(config.training, self.index.num_images / config.training.global_batch)

        self.backbone = build_backbone(config.backbone, config.run.seed).to(ranks.device)
        scaled = config.backbone.precision == "float16"
        self.loss_scale = LossScale(config.training, ranks.head_device, enabled=scaled)
        self.head_group = None
        if config.distributed.head_group:
            self.head_group = distributed.new_group(config.distributed.init_timeout_seconds)
        self.head = build_head(
            config.head,
            self.index.num_identities,
            config.backbone.embedding_size,
            seed=config.run.seed,
            device=ranks.head_device,
            optimizer=config.head_optimizer,
            ranks_group=self.head_group,
            # In float16 a step may be called off by the backbone's gradient, so the rows wait for it.
            fused=config.training.accumulation == 1 and not scaled,
        )
        self.optimizer = build_optimizer(
            self.backbone, config.optimizer, decay_norms_and_biases=config.training.decay_norms_and_biases
        )
        self.replica: nn.Module = self.backbone
        if ranks.world > 1:
            self.replica = DistributedDataParallel(
                self.backbone,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                **_RANKS_KEEP_THEIR_BUFFERS,
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.distributed.bucket_mib,
            )
        self.nonfinite_in_a_row = torch.zeros((), dtype=torch.int64, device=ranks.head_device)

        self.step = 0
        self.step = self._resume(before)
        if ranks.is_main:
            self.folder.keep_config(self.asked)
        self.tracker = Tracker(
            self.folder.path,
            config.tracking,
            total_steps=self.schedule.total_steps,
            start_step=self.step,
            images_per_step=config.training.global_batch,
            steps_per_epoch=self.index.num_images / config.training.global_batch,
            is_main=ranks.is_main,
        )
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
            quarantine=self.folder.quarantine,
        )

    def run(self) -> bool:
        """Train until the last step or an interruption; returns whether the last step was reached."""
        self._announce()
        config, total = self.config, self.schedule.total_steps
        first, results = self.step, {}
        while self.step < total:
            values = self._train_step(self.step)
            self.step += 1
            if self.step == first + 1:
                self._bound_collectives(config.distributed.timeout_seconds)
            is_record = _is_due(self.step, config.tracking.every_steps, total)
            self.tracker.log_step(self.step, values)
            if is_record:
                self._stop_if_not_finite()
            if _is_due(self.step, config.evaluation.every_steps, total):
                results = self._verify()
            # A GPU is not made to wait for the ranks' agreement more often than for a record.
            stop = (is_record or self.ranks.device.type == "cpu") and distributed.agree(self.interrupt.requested)
            if _is_due(self.step, config.checkpoint.every_steps, total) or stop:
                self._save()
            if stop and self.step < total:
                self.tracker.note(f"interrupted: checkpoint at step {self.step}; the same command goes on from there")
                return False
        if config.export.enabled and (self.step > first or not self.folder.model.exists()):
            self._export(results)
        return True

    def close(self) -> None:
        """Release the pipeline and the files."""
        self.pipeline.close()
        self.tracker.close()

    def _train_step(self, step: int) -> dict[str, Tensor | float]:
        """One update from one global batch; returns what is recorded of it, on the device."""
        config, passes = self.config.training, self.config.training.accumulation
        factor = self.schedule.factor(step)
        lr, head_lr = self.config.optimizer.lr * factor, self.config.head_optimizer.lr * factor
        set_lr(self.optimizer, lr)
        strength = self.schedule.margin_strength(step, self.config.head.margin_warmup_epochs)
        self.optimizer.zero_grad(set_to_none=True)
        device, head_device = self.ranks.device, self.ranks.head_device
        loss, cosine = torch.zeros((), device=head_device), torch.zeros((), device=head_device)
        norm = torch.zeros((), device=device)
        finite = torch.ones((), dtype=torch.bool, device=head_device)
        for micro_step in range(step * passes, (step + 1) * passes):
            batch = next(self.pipeline)
            if micro_step == 0:
                self.tracker.images("first batch", batch.images, 0)
            seed_step(self.config.run.seed, micro_step, self.ranks.rank)
            with self._synchronised(last=micro_step == (step + 1) * passes - 1):
                embeddings = self.replica(batch.images)
                output = self.head(
                    embeddings.to(head_device),
                    batch.labels.to(head_device),
                    lr=head_lr,
                    step=step,
                    strength=strength,
                    sizes=self.sizes,
                    loss_weight=1 / passes,
                    loss_scale=self.loss_scale.value,
                )
                (output.loss * self.loss_scale.value).backward()
            loss += output.loss.detach()
            cosine += output.target_cosine / passes
            norm += embeddings.detach().norm(dim=1).mean() / passes
            finite &= output.finite
        self.loss_scale.unscale(self.backbone.parameters())
        gradient_norm = clip_gradients(self.backbone.parameters(), config.clip_norm)
        finite &= gradient_norm.isfinite().to(head_device)
        if self.head.row_sum is not None:
            self.head.apply_gradient(head_lr, finite, step=step)
        step_if_finite(self.optimizer, finite.to(device))
        self.loss_scale.update(finite)
        self.nonfinite_in_a_row = torch.where(finite, 0, self.nonfinite_in_a_row + 1)
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "lr": lr,
            "target_cosine": cosine,
            "embedding_norm": norm,
            "gradient_norm": gradient_norm,
        }
        if self.loss_scale.enabled:
            values["loss_scale"] = self.loss_scale.value
        return values

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the ranks in the last pass of a step alone."""
        if last or not isinstance(self.replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.replica.no_sync()

    def _stop_if_not_finite(self) -> None:
        in_a_row = int(self.nonfinite_in_a_row)
        if in_a_row:
            scaled = f"; the loss's scale is {float(self.loss_scale.value):g} now" if self.loss_scale.enabled else ""
            log.warning(
                "step %d: loss or gradient were not finite in the last %d steps, which changed nothing%s",
                self.step,
                in_a_row,
                scaled,
            )
        if in_a_row >= self.config.training.max_nonfinite_steps:
            raise UserError(
                f"step {self.step}: the loss has not been finite for {in_a_row} steps. The weights are those of step "
                f"{self.step - in_a_row}; lower optimizer.lr or lengthen training.warmup_epochs, and look at "
                f"{self.folder.path / 'metrics.jsonl'} for where it began"
            )

    def _verify(self) -> dict[str, Verification]:
        """Verify on every set, its images split over the ranks; keep the backbone if it is the best so far."""
        results: dict[str, Verification] = {}
        with self.tracker.pause():
            average_running_statistics(self.backbone)
            embedder = BackboneEmbedder(self.backbone, self.ranks.device, float32=True)
            for pairs in self.pair_sets:
                results[pairs.name] = self._verify_set(embedder, pairs)
                self.tracker.verification(self.step, pairs.name, results[pairs.name].to_json())
            if results and self.ranks.is_main:
                accuracy = sum(result.accuracy for result in results.values()) / len(results)
                self.folder.keep_best(self.backbone, self.step, accuracy)
        return results

    def _verify_set(self, embedder: BackboneEmbedder, pairs: PairSet) -> Verification:
        sizes = distributed.split(2 * len(pairs), self.ranks.world)
        start = sum(sizes[: self.ranks.rank])
        part = range(start, start + sizes[self.ranks.rank])
        local = torch.from_numpy(embed_pairs(embedder, pairs, self.config.evaluation.batch, part))
        embeddings = distributed.all_gather_rows(local.to(self.ranks.head_device), sizes)
        return verify(embeddings.cpu().numpy(), pairs.same)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, sharing storage with what is trained."""
        parts = {
            "backbone": self.backbone.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.backbone),
            "head": self.head.state(),
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _save(self) -> None:
        with self.tracker.pause():
            average_running_statistics(self.backbone)
            self.checkpoints.save(self.step, self._tensors(), self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": json.loads(self.asked.model_dump_json()),
            "resolved": self.resolved.facts(),
            "loss_scale": self.loss_scale.state(),
            "fingerprint": self.index.fingerprint,
            "images": self.index.num_images,
            "identities": self.index.num_identities,
        }

    def _resume(self, before: dict[str, Any]) -> int:
        """Load the checkpoint that was found, if there is one, whose facts are `before`; returns its step."""
        if self.checkpoint is None:
            return 0
        self.folder.refuse_if_changed(before, self._facts())
        self.checkpoints.load(self.checkpoint, self._tensors())
        self.loss_scale.load(before.get("loss_scale", {}))
        return int(before["step"])

    def _bound_collectives(self, seconds: float) -> None:
        distributed.set_timeout(seconds)
        if self.head_group is not None:
            distributed.set_timeout(seconds, self.head_group)

    def _export(self, results: dict[str, Verification]) -> None:
        """Write the deployable and its card on the main rank; a failure there stops every rank."""
        self._bound_collectives(self.config.distributed.init_timeout_seconds)
        facts = {name: value for name, value in self._facts().items() if name not in ("config", "loss_scale")}
        facts |= {"backbone": self.config.backbone.name, "loss": self.config.head.loss.name}
        facts["verification"] = {name: result.to_json() for name, result in results.items()}

        def on_main() -> None:
            if self.ranks.is_main:
                export(self.backbone, self.folder.model, facts, self.config.export)

        _local_main_first(self.ranks, on_main)

    def _announce(self) -> None:
        index, ranks, total = self.index, self.ranks, self.schedule.total_steps
        parameters = sum(parameter.numel() for parameter in self.backbone.parameters())
        self.tracker.note(f"{index.num_images:,} images of {index.num_identities:,} identities: {index.path}")
        processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
        threads = self.config.training.threads
        self.tracker.note(
            f"{processes} on {self.resolved.hardware}, each with {threads} CPU thread{'s' if threads > 1 else ''}"
        )
        self.tracker.note(f"{self.config.backbone.name}, {parameters / 1e6:.1f} M parameters")
        self.tracker.note(str(self.resolved))
        for text in self.resolved.notes:
            self.tracker.warn(text)
        self.tracker.note(
            f"{total:,} steps of {self.config.training.global_batch} images"
            + (f", from step {self.step:,} on" if self.step else "")
        )


def _resolved(facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint with these facts was computed in; one that does not say so has it in its settings."""
    if "resolved" in facts or not facts:
        return facts.get("resolved", {})
    asked = {f"{name}.precision": facts["config"][name].get("precision") for name in ("backbone", "head")}
    return {name: precision for name, precision in asked.items() if precision != "auto"}


def _is_due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _micro_batch_sizes(config: Config, world: int) -> list[int]:
    """Images of each rank in one forward pass. Raises UserError where a rank gets too few for its BatchNorm."""
    sizes = distributed.split(config.training.global_batch // config.training.accumulation, world)
    if min(sizes) < 2:
        raise UserError(
            f"training.global_batch ({config.training.global_batch}) over {world} ranks and "
            f"{config.training.accumulation} passes leaves a rank {min(sizes)} images; BatchNorm needs 2. "
            "Raise training.global_batch, lower training.accumulation or start fewer ranks"
        )
    return sizes


def _local_main_first(ranks: Ranks, prepare: Callable[[], T]) -> T:
    """Call `prepare` on each machine's first rank, then on the others; a failure on one stops all."""
    result: T | None = None
    error: Exception | None = None
    if ranks.local_rank == 0:
        try:
            result = prepare()
        except Exception as caught:
            error = caught
    failed = distributed.agree(error is not None)
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhere("another rank could not prepare the run")
    return prepare() if ranks.local_rank else result  # type: ignore[return-value]
