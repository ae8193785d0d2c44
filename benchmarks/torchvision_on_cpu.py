"""Import this first: torchvision as package registries have it for Linux needs CUDA's libraries for its operators, and
without them its own import fails, as it describes two operators that are not there. No model here uses them."""

import torch

try:
    import torchvision  # noqa: F401 - to see whether it can be imported
except RuntimeError:
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
