"""What pictures of patch grids share: values drawn large, and laid over a photograph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

BRIGHTEST = 0.995  # quantile of a map that is drawn at full strength


def pixels(picture: Image) -> np.ndarray:
    """[h, w, 3] in [0, 1]."""
    import numpy as np

    return np.asarray(picture.convert("RGB")) / 255


def upsampled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of patches [gh, gw, C] as a smooth picture [h, w, C] in [0, 1], on the CPU."""
    image = values.float().cpu().permute(2, 0, 1)[None]  # (1, C, gh, gw)
    image = F.interpolate(image, size, mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).clamp(0, 1)


def overlay(photograph: np.ndarray, strength: Tensor) -> np.ndarray:
    """A map [gh, gw] of values from 0 up, glowing over a dimmed photograph [h, w, 3]."""
    from matplotlib import colormaps

    brightest = strength.float().quantile(BRIGHTEST).clamp(min=1e-12)
    strength = (strength.float() / brightest).clamp(max=1)
    h, w = photograph.shape[:2]
    smooth = upsampled(strength[..., None], (h, w)).numpy()  # (h, w, 1)
    heat = colormaps["inferno"](smooth[..., 0])[..., :3]
    grey = photograph.mean(-1, keepdims=True) * 0.55
    weight = smooth**0.5
    return grey * (1 - weight) + heat * weight


def canvas(width: float, height: float) -> Any:
    """An empty white figure of so many inches, at 150 dots an inch; no window is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panel(axes: Any, picture: np.ndarray, title: str) -> None:
    """Draw `picture` with its title over its left edge and no axes."""
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, color="#222222", loc="left", pad=7)


def write_lines(figure: Any, lines: list[str], left: float = 0.03) -> None:
    """Text at the bottom of a figure, the first line bold; 0.27 inches a line. `left` is a share
    of the width."""
    height = figure.get_figheight()
    for i, line in enumerate(lines):
        bottom = (0.27 * (len(lines) - i) - 0.05) / height
        style = ("#555555", "normal") if i else ("#111111", "bold")
        figure.text(left, bottom, line, fontsize=11, color=style[0], fontweight=style[1])
