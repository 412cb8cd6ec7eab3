"""What only a GPU can show: its decoder, its autocast, NCCL, and that a run there learns as one on the CPU does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recognition import config
from recognition.config import Augment, Data, Head
from recognition.data.index import open_index
from recognition.data.procedural.dataset import write_faces
from recognition.head import ShardedSoftmax
from recognition.training.loss_scale import LossScale
from tests.support.ranks import launch_ranks, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY = Path(__file__).parent.parent / "integration" / "tiny.toml"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=20, images_per_identity=8, pairs=20, seed=1)
    return folder


def test_the_gpu_decodes_and_augments_as_the_cpu_does(faces: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    from recognition.data.pipeline import Pipeline

    settings = Data(path=faces, augment=Augment(shift=0.05, brightness=0.2, erase=0.5))
    batches = []
    for device in ("cpu", "cuda"):
        pipeline = Pipeline(
            open_index(faces),
            settings,
            seed=0,
            batch=32,
            rank=0,
            world=1,
            device=torch.device(device),
            image_size=112,
            channels_last=True,
        )
        batches.append(next(pipeline))
        pipeline.close()
    assert batches[1].images.is_cuda
    torch.testing.assert_close(batches[1].labels.cpu(), batches[0].labels)
    assert (batches[1].images.cpu() - batches[0].images).abs().mean() < 0.02


HEADS = {
    "cosface": Head(loss=config.CosFace()),
    "softmax": Head(loss=config.Softmax()),
    "curricularface": Head(loss=config.CurricularFace()),
    "adaface": Head(loss=config.AdaFace()),
    "uce": Head(loss=config.UCE(scale=16.0)),
    "sub-centres, filtered": Head(loss=config.ArcFace(), subcenters=3, filter=config.Filter(threshold=0.3)),
    "sampled": Head(loss=config.CosFace(), sample_rate=0.3),
    "lazy": Head(loss=config.CosFace(), sample_rate=0.3, inactive_rows="lazy"),
    "split": Head(loss=config.CosFace(), row_format="split"),
    "bfloat16": Head(loss=config.CosFace(), row_format="bfloat16"),
    "adamw": Head(loss=config.CosFace(), optimizer=config.AdamW()),
}


def head_steps(device: str, settings: Head) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    settings = settings.model_copy(update={"precision": "float32", "chunk": 300})
    head = ShardedSoftmax(settings, 1000, 64, seed=0, device=torch.device(device), update_in_backward=True)
    head.rows.load(torch.randn(len(head.rows), 64, generator=generator))
    found = []
    for step in range(3):
        embeddings = torch.randn(32, 64, generator=generator).to(device).requires_grad_()
        labels = torch.randint(0, 1000, (32,), generator=generator).to(device)
        output = head(embeddings, labels, lr=0.1, step=step)
        output.loss.backward()
        assert embeddings.grad is not None
        found += [output.loss.detach().cpu().numpy(), embeddings.grad.cpu().numpy()]
    head.state_dict_tensors()
    return [*found, head.rows.read(slice(None)).cpu().numpy()]


@pytest.mark.parametrize("name", HEADS)
def test_steps_of_the_head_are_the_cpus(name: str) -> None:
    (expected,) = run_ranks(head_steps, 1, "cpu", HEADS[name])
    (found,) = run_ranks(head_steps, 1, "cuda", HEADS[name], backend="cpu:gloo,cuda:nccl")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-2 if name == "bfloat16" else 1e-3, atol=1e-5)


def test_the_scale_of_the_loss_is_decided_without_the_host() -> None:
    device = torch.device("cuda")
    scale = LossScale(config.Training(initial_loss_scale=8.0, loss_scale_growth_steps=2), device, enabled=True)
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    parameter.grad = torch.full_like(parameter, 16.0)
    flags = torch.tensor([True, False, True, True], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale.unscale([parameter])
        for flag in flags:
            scale.update(flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parameter.grad.tolist() == [2.0] * 3
    assert scale.state() == {"value": 8.0, "good_steps": 0}


def run(faces: Path, folder: Path, precision: str) -> bool:
    overrides = [f"data.path={faces}", f"run.folder={folder}", "backbone.name=resnet10t", "training.epochs=4.0"]
    overrides += ["training.global_batch=40", "optimizer.lr=0.05", f"evaluation.pairs={faces / 'pairs.bin'}"]
    from recognition.training.trainer import train

    return train(config.load(TINY, [*overrides, f"backbone.precision={precision}"]))


@pytest.mark.parametrize("precision", ["auto", "float16"])
def test_a_run_on_every_gpu_reaches_its_end_and_exports(faces: Path, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    assert all(launch_ranks(run, torch.cuda.device_count(), faces, tmp_path / "run", precision, timeout=300))
    assert (tmp_path / "run/model.onnx").exists()
