"""The descent itself, without any transformer: find the minima of an energy of your own.

python examples/own_energy.py --output descent.png
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from ebt_transformers.modeling_ebt.descent import DescentStep, descend


class Plane:
    """A candidate is a point of the plane; it moves against the gradient."""

    def point(self, state: Tensor) -> Tensor:
        """The point itself."""
        return state

    def embed(self, point: Tensor) -> Tensor:
        """The energy takes points as they are."""
        return point

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """Gradient descent."""
        return point - step_size * gradient


def himmelblau(points: Tensor, landscape: int) -> Tensor:
    """Himmelblau's function, scaled: four minima of energy 0. Points (..., 2) to energies (...)."""
    x, y = points.unbind(-1)
    return ((x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2) / 100


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--step_size", type=float, default=0.5)
    parser.add_argument("--output", default="descent.png")
    options = parser.parse_args(argv)
    start = torch.cartesian_prod(torch.linspace(-4, 4, 5), torch.linspace(-4, 4, 5))
    path = [start]
    result = descend(
        himmelblau,
        Plane(),
        start,
        [DescentStep(0, options.step_size)] * options.steps,
        final_energy=True,
        on_step=lambda index, state, energy: path.append(state),
    )
    energies = torch.stack(result.energies)
    print(f"Mean energy of {len(start)} candidates: {energies[0].mean():.3f} -> {energies[-1].mean():.3f}")
    minima, counts = torch.unique((result.state * 10).round() / 10, dim=0, return_counts=True)
    for (x, y), count in zip(minima.tolist(), counts.tolist(), strict=True):
        print(f"  {count} candidates came to rest near ({x:.1f}, {y:.1f})")

    import matplotlib.pyplot as plt

    grid = torch.linspace(-5, 5, 200)
    height = himmelblau(torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1), 0)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.contourf(grid, grid, height.sqrt(), levels=20, cmap="cividis")
    for walk in torch.stack(path, dim=1).numpy():
        axes.plot(*walk.T, "-o", color="white", linewidth=1, markersize=2)
    axes.set(title="25 candidates descend one energy", xlabel="x", ylabel="y")
    figure.savefig(options.output, dpi=100)
    print(f"The walks: {options.output}")


if __name__ == "__main__":
    main()
