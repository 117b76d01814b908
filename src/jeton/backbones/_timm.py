"""How a backbone that timm keeps is worn: one interface, named sizes, and the published counts beside each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..registry import nearest


@dataclass(frozen=True)
class Size:
    """One size of a backbone: its name in timm (None where timm has none), and what was published for it (None: nothing).

    `params` are those of the model with 1000 classes, `macs` multiply-adds in 1e9 on one image of 224 x 224, `top1` the
    ImageNet-1K accuracy in %."""

    timm: str | None
    params: int | None = None
    macs: float | None = None
    top1: float | None = None


class Backbone(nn.Module):
    """An image classifier that also gives its feature maps.

    `pixel_values` (B, 3, H, W), normalized as its weights want -> logits (B, classes). `maps` gives one (B, C_s, H / s, W / s)
    per stage, strides s = 4, 8, 16, 32. `pretrained=True` downloads timm's weights where it has them. Needs jeton[timm].
    """

    sizes: ClassVar[Mapping[str, Size]]

    def __init__(self, size: str, *, num_classes: int = 1000, pretrained: bool = False, **options: Any) -> None:
        super().__init__()
        if size not in self.sizes:
            raise ValueError(f"{type(self).__name__} has no size {size!r}; there are {', '.join(self.sizes)}.")
        self.size = size
        self.net = self.build(self.sizes[size], num_classes, pretrained, options)

    def build(self, size: Size, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
        return timm().create_model(size.timm, num_classes=num_classes, pretrained=pretrained, **options)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The feature map of every stage, channels first."""
        return self.net.forward_intermediates(pixel_values, intermediates_only=True)


def timm() -> Any:
    """The library, or a sentence on how to get it."""
    try:
        import timm
    except ImportError as missing:
        raise ImportError(f"this backbone is timm's: pip install 'jeton[timm]' ({missing}).") from missing
    return timm


def create(name: str, **options: Any) -> Backbone:
    """A backbone by id and size: ``create("davit-tiny")``, ``create("metaformer-baselines-caformer_s18", num_classes=10)``."""
    from ..registry import systems

    known = {f"{card.id}-{size}": (card.object, size) for card in systems("backbone") for size in card.object.sizes}
    if name not in known:
        raise ValueError(f"there is no backbone {name!r}.{nearest(name, known)}")
    cls, size = known[name]
    return cls(size, **options)
