"""The plainest candidate space, for tests of the descent away from any model."""

from torch import Tensor


class Points:
    """States are points, and the energy sees them as they are."""

    def point(self, state: Tensor) -> Tensor:
        """The state."""
        return state

    def embed(self, point: Tensor) -> Tensor:
        """The state."""
        return point

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """Plain gradient descent."""
        return state - step_size * gradient
