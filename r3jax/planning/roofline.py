"""How long a program takes at the least: by arithmetic, by memory, by network (Williams et al. 2009, "Roofline").

If all three overlap perfectly the slowest decides; if nothing overlaps they add up. A real step lies between the two
or, where kernels do not reach the peaks that data sheets give, above.
"""

import dataclasses

from r3jax.planning.costs import Costs
from r3jax.planning.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, by resource."""

    arithmetic: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        return max(self.arithmetic, self.memory, self.network)

    @property
    def added(self) -> float:
        return self.arithmetic + self.memory + self.network

    @property
    def limit(self) -> str:
        """What decides."""
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)


def times(costs: Costs, chip: Chip) -> Times:
    """Where chips have two networks, a collective whose group reaches beyond a host runs at the slower one's speed."""
    network = 0.0
    for c in costs.collectives:
        beyond = chip.per_host and c.spread >= chip.per_host
        network += c.wire_bytes / (chip.host_links if beyond else chip.links)
    return Times(costs.flops / chip.flops, costs.bytes / chip.bandwidth, network)


def utilisation(useful: float, seconds: float, chip: Chip) -> float:
    """Model FLOPs utilisation: `useful` operations of one chip over what it could have done meanwhile."""
    return useful / (seconds * chip.flops) if seconds else 0.0
