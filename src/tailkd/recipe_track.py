"""Keys of the tools that show a run while it trains; none by default."""

from __future__ import annotations

from tailkd.recipe_types import Section


class Wandb(Section):
    project: str = "tailkd"
    """Project; the account is the one of WANDB_API_KEY or `wandb login`, the server that of WANDB_BASE_URL."""
    entity: str | None = None
    """User or team; null is the account's own."""
    group: str | None = None
    """Runs of one comparison."""
    offline: bool = False
    """Write into the run folder alone; `wandb sync` sends it later."""


class Trackio(Section):
    project: str = "tailkd"
    """Project."""
    space: str | None = None
    """Space on the hub that shows it (private where it is made); null keeps it on this machine."""


class Track(Section):
    tensorboard: bool = False
    """Write event files into `tensorboard` of the run folder."""
    wandb: Wandb | None = None
    """Weights & Biases; null for not."""
    trackio: Trackio | None = None
    """trackio; null for not."""

    @property
    def tools(self) -> tuple[str, ...]:
        """Those that are asked for."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) not in (None, False))
