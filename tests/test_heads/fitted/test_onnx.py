"""Linear heads to ONNX and back, as docs/heads.md says it; skipped where onnx is not installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from heads import LinearHead


def test_a_linear_head_to_onnx_and_back(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    draws = np.random.default_rng(0)
    weights, bias = draws.normal(size=(3, 8)).astype(np.float32), draws.normal(size=3).astype(np.float32)
    head, file = LinearHead(weights, bias, ("a", "b", "c")), tmp_path / "head.onnx"
    rows = {0: torch.export.Dim("rows")}
    torch.onnx.export(head.to_torch(), (torch.zeros(2, 8),), str(file), dynamic_shapes=(rows,))
    found = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    back = LinearHead(found["weight"], found["bias"], head.classnames)
    X = draws.normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(back.logits(X), head.logits(X))
