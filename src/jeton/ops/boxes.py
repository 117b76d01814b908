"""Boxes (x0, y0, x1, y1) in pixels, on (N, 4) tensors: overlap, hull, quadrants, merging of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """(...) of boxes (..., 4); nothing where a box is turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) the area that boxes (N, 4) and (M, 4) share."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) intersection over union; 0 where both boxes are empty."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None] - shared
    return torch.where(union > 0, shared / union.clamp_min(torch.finfo(torch.float32).tiny), 0)


def hull(boxes: Tensor) -> Tensor:
    """(4,) the smallest box that holds all of (N, 4), N >= 1."""
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def merge_neighbours(boxes: Tensor, threshold: float) -> Tensor:
    """(M, 4) boxes (N, 4) after those with an IoU above `threshold` have been replaced by their hull, until no two are."""
    boxes = boxes.clone()
    while len(boxes) > 1:
        overlap = iou(boxes, boxes).fill_diagonal_(0)
        first, second = divmod(int(overlap.argmax()), len(boxes))
        if overlap[first, second] <= threshold:
            break
        boxes[first] = hull(boxes[[first, second]])
        boxes = torch.cat([boxes[:second], boxes[second + 1 :]])
    return boxes


def quadrants(width: int, height: int) -> Tensor:
    """(4, 4) the 2 x 2 grid of a picture, row by row; an odd side gives its last pixel to the later half."""
    x, y = width // 2, height // 2
    corners = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    return torch.tensor(corners, dtype=torch.float32)


def clip(boxes: Tensor, width: int, height: int) -> Tensor:
    """(N, 4) boxes cut to the picture."""
    return torch.minimum(boxes.clamp_min(0), boxes.new_tensor([width, height, width, height]))
