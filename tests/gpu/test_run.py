"""What only a GPU can show: its decoder, its autocast, NCCL, and that a run there learns as one on the CPU does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ranks import launch_ranks, run_ranks
from recognition import config, trainer
from recognition.config import Augment, CosFace, Data, Head
from recognition.data.faces import write_faces
from recognition.data.index import open_index
from recognition.head import build_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY = Path(__file__).parent.parent / "integration" / "tiny.toml"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=20, images=8, pairs=20, seed=1)
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


def head_step(device: str) -> tuple[float, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(32, 64, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, 1000, (32,), generator=generator).to(device)
    settings = Head(loss=CosFace(), precision="float32", chunk=300)
    head = build_head(settings, 1000, 64, seed=0, device=torch.device(device), fused=True)
    output = head(embeddings, labels, lr=0.1, step=0)
    output.loss.backward()
    assert embeddings.grad is not None
    return float(output.loss), embeddings.grad.cpu().numpy(), head.rows.weight.cpu().numpy()


def test_a_step_of_the_head_is_the_cpus() -> None:
    (expected,) = run_ranks(head_step, 1, "cpu")
    (found,) = run_ranks(head_step, 1, "cuda", backend="cpu:gloo,cuda:nccl")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def run(faces: Path, folder: Path) -> bool:
    overrides = [f"data.path={faces}", f"run.folder={folder}", "backbone.name=resnet10t", "training.epochs=4.0"]
    overrides += ["training.global_batch=40", "optimizer.lr=0.05", f"evaluation.pairs={faces / 'pairs.bin'}"]
    return trainer.train(config.load(TINY, overrides))


def test_a_run_on_every_gpu_reaches_its_end_and_exports(faces: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    assert all(launch_ranks(run, torch.cuda.device_count(), faces, tmp_path / "run", timeout=300))
    assert (tmp_path / "run/model.onnx").exists()
