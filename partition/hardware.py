"""The machines as values: devices, links, meshes, clusters, every number with its kind and its source.

`Cluster.nx` is the NetworkX view: meshes as nodes, links (EFA and others) as edges annotated with latency, bandwidth, ingest
limit and price. Nothing here reads files; `profiles.py` does.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from partition.errors import ProfileError

if TYPE_CHECKING:
    import networkx as nx


class Kind(enum.StrEnum):
    """How a number is known."""

    PUBLISHED = "published"
    DERIVED = "derived"
    MEASURED = "measured"
    ASSUMED = "assumed"


class End(enum.StrEnum):
    """An end of a band."""

    LOW = "low"
    HIGH = "high"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One number in SI units with its kind and where it comes from; `float(q)` is the number.

    low and high are the band that it is known to lie in, None where it is taken as exact.
    """

    value: float
    kind: Kind
    source: str
    low: float | None = None
    high: float | None = None

    def __float__(self) -> float:
        return self.value

    def at(self, end: End) -> Quantity:
        """The number at one end of its band, with no band left."""
        value = self.value if self.low is None or self.high is None else self.low if end is End.LOW else self.high
        return dataclasses.replace(self, value=value, low=None, high=None)


def number(dimension: str, **options: Any) -> Any:
    """A field that holds a Quantity of a dimension of `units.UNITS`: what profiles read and `Cluster.replace` sets."""
    return dataclasses.field(metadata={"dimension": dimension}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The memory that holds weights, KV cache and activations: capacity [B], bandwidth [B/s], usable share of the capacity."""

    capacity: Quantity = number("bytes")
    bandwidth: Quantity = number("bandwidth")
    usable: Quantity = number("fraction")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """How a wafer computes: each layer on a square of cores, one after the other, its weights in the SRAM of those cores.

    cores: of the wafer. clock [Hz]. lanes: multiply-adds that a core starts in a cycle. A contraction of r rows on a square of g x g cores
    takes fixed + hop x g + r x (row_fixed + row_hop x g) + mac x multiply-adds / (lanes x g^2) cycles: what it costs to begin, the way over
    the cores, both again for each row, and the arithmetic. side: g, where it is not what layers side by side leave each.
    """

    cores: Quantity = number("number")
    clock: Quantity = number("frequency")
    lanes: Quantity = number("number")
    fixed: Quantity = number("cycles")
    hop: Quantity = number("cycles")
    row_fixed: Quantity = number("cycles")
    row_hop: Quantity = number("cycles")
    mac: Quantity = number("cycles")
    side: Quantity | None = number("number", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Systolic:
    """How a Neuron chip computes: a systolic array in each of its cores, attention on the vector engines, one compiled shape for a bucket.

    cores: of the chip, over which ops are split as over chips. rows: the fewest that a pass through the array takes. score [s]: of one key
    position for one query row of one head on a core; score_rows [s]: the more that `tile` rows of queries take. start, step [s]: what the
    server adds to a request and to each decode step. bucket: prompts and caches are padded to this times a power of two. prefill_batch:
    prompts that prefill takes at once.
    """

    cores: Quantity = number("number")
    rows: Quantity = number("number")
    tile: Quantity = number("number")
    score: Quantity = number("time")
    score_rows: Quantity = number("time")
    start: Quantity = number("time")
    step: Quantity = number("time")
    bucket: Quantity = number("number")
    prefill_batch: Quantity = number("number")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """How a GPU computes: tiles dealt out in waves to equal processors, a smooth roofline, kernels that take time to launch.

    processors: streaming multiprocessors. launch [s]: of a kernel. reduction [s]: the second kernel of a contraction whose inner dimension is
    split. exponent: how sharp the roofline bends. epilogue [s]: of a tile of 128 x 128 results. load [B/s]: operands into one processor.
    attention_launch, attention_split, attention_block [s]: of an attention, the kernel that joins split keys, each block of query rows.
    softmax [elements/s]: of one processor. cache_write: the bytes of new keys and values, how many times over. packs: whether a block
    takes the query heads that share a key, as FlashAttention 3 does.
    """

    processors: Quantity = number("number")
    launch: Quantity = number("time")
    reduction: Quantity = number("time")
    exponent: Quantity = number("number")
    epilogue: Quantity = number("time")
    load: Quantity = number("bandwidth")
    attention_launch: Quantity = number("time")
    attention_split: Quantity = number("time")
    attention_block: Quantity = number("time")
    attention_exponent: Quantity = number("number")
    softmax: Quantity = number("frequency")
    cache_write: Quantity = number("number")
    packs: bool = False


FORMATS = ("program", "float32", "float16", "bfloat16", "cbfloat16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2")
"""Formats of floats that devices compute in: "program" is what the program says, cbfloat16 has 6 bits of exponent and 9 of mantissa, float8_e4m3
reaches 240 and float8_e4m3fn 448."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """In which formats a device computes (see `precision.FORMATS`). multiply: what operands of contractions are rounded to; accumulate: how their
    products are summed; result: what results are kept in that the program keeps in 16 bits or fewer. "program": the type that the program says.

    float8: the format that this device has for 8 bits. kind and source: how this is known.
    """

    kind: Kind
    source: str
    multiply: str = "program"
    accumulate: str = "float32"
    result: str = "program"
    float8: str = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One chip, wafer or GPU. How its contractions cost what they cost, a `region`, `systolic` or `streaming` says; without, a plain roofline.

    peak: dense FLOP/s by dtype. compute_efficiency, memory_efficiency: the share of peak and of bandwidth that large ops reach.
    contraction_latency [s]: the fixed time of one contraction (launch, fabric hops), which no roofline shows. price [$/s], power [W].
    precision: in which formats it computes, None where it computes as the program says, summing in float32.
    """

    name: str
    title: str
    peak: Mapping[str, Quantity]
    memory: Memory
    compute_efficiency: Quantity = number("fraction")
    memory_efficiency: Quantity = number("fraction")
    contraction_latency: Quantity = number("time")
    price: Quantity = number("price")
    power: Quantity = number("power")
    region: Region | None = None
    systolic: Systolic | None = None
    streaming: Streaming | None = None
    precision: Precision | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A way for bytes: time = alpha [s] + bytes / beta [B/s]. Inside a mesh, alpha is that of one small collective, beta its bus rate.

    price [$/B] is what the provider charges for a byte. topology: how devices of a mesh are joined, one of TOPOLOGIES; hop [s]: each step of a
    collective after the first takes that (see `collectives`), mesh_below and ring_above [B]: from where to where its algorithm is another.
    ports, stripe [B]: a transfer of less than a stripe for each port uses so many fewer of them. block [B], block_time [s]: senders cut
    transfers in blocks that take this time each beside their bytes. cold [s]: the first transfer of all takes so much longer.
    """

    name: str
    title: str
    alpha: Quantity = number("time")
    beta: Quantity = number("bandwidth")
    price: Quantity = number("price per byte")
    topology: str = "all_to_all"
    hop: Quantity | None = number("time", default=None)
    mesh_below: Quantity | None = number("bytes", default=None)
    ring_above: Quantity | None = number("bytes", default=None)
    ports: Quantity | None = number("number", default=None)
    stripe: Quantity | None = number("bytes", default=None)
    block: Quantity | None = number("bytes", default=None)
    block_time: Quantity | None = number("time", default=None)
    cold: Quantity | None = number("time", default=None)


TOPOLOGIES = ("all_to_all", "ring", "torus", "tree")
"""How the devices of a mesh may be joined."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """`count` equal devices that run one stage together, joined by `fabric`.

    `stand_in` is how many CPU host devices stand for them when stages run; what that degree cannot show, the verdict says.
    """

    name: str
    device: Device
    count: int
    stand_in: int
    fabric: Link | None = None

    @property
    def capacity(self) -> float:
        """Bytes that weights, KV cache and activations may fill on all devices of the mesh together."""
        return self.count * float(self.device.memory.capacity) * float(self.device.memory.usable)

    @property
    def ways(self) -> int:
        """Over how many ops can be split: devices, or the cores of all of them where these have memory of their own."""
        return self.count * (int(float(self.device.systolic.cores)) if self.device.systolic is not None else 1)

    @property
    def price(self) -> float:
        """$/s of all its devices."""
        return self.count * float(self.device.price)

    @property
    def power(self) -> float:
        """W of all its devices at work."""
        return self.count * float(self.device.power)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A link between two meshes, in both directions. `ingest` [B/s] is the most that the receiving side `dst` takes in, if it binds.

    gateway [s]: what a machine between the two networks adds to a transfer.
    """

    src: str
    dst: str
    link: Link
    ingest: Quantity | None = None
    gateway: Quantity | None = None

    @property
    def alpha(self) -> float:
        """Seconds from the start of a transfer until its first byte has arrived."""
        return float(self.link.alpha) + (float(self.gateway) if self.gateway else 0.0)

    @property
    def beta(self) -> float:
        """Bytes per second that really pass: the narrower of link and ingest, and what blocks leave of it."""
        wire = min(float(self.link.beta), float(self.ingest) if self.ingest else float("inf"))
        block, time = self.link.block, self.link.block_time
        return wire if block is None or time is None else 1.0 / (1.0 / wire + float(time) / float(block))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Meshes and the links between them."""

    name: str
    title: str
    meshes: tuple[Mesh, ...]
    edges: tuple[Edge, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}"]
        lines += [f"  mesh {m.name}: {m.count} x {m.device.title}, {m.capacity / 1e9:,.0f} GB usable, $ {m.price * 3600:,.2f} per hour" for m in self.meshes]
        joined = {tuple(sorted((e.src, e.dst))): e for e in self.edges}
        lines += [f"  link {a} - {b}: {e.link.title}, {e.beta / 1e9:,.3g} GB/s, {float(e.link.alpha) * 1e6:,.3g} us" for (a, b), e in sorted(joined.items())]
        return "\n".join(lines)

    def mesh(self, name: str) -> Mesh:
        """The mesh of that name; raises KeyError."""
        return next(m for m in self.meshes if m.name == name)

    @functools.cached_property
    def nx(self) -> nx.DiGraph[str]:
        """Meshes as nodes (device, count, capacity, price), links as edges (alpha, beta, ingest, price, link)."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        for m in self.meshes:
            graph.add_node(m.name, device=m.device.name, count=m.count, capacity=m.capacity, price=m.price, mesh=m)
        for e in self.edges:
            graph.add_edge(
                e.src, e.dst, link=e.link.name, alpha=float(e.link.alpha), beta=e.beta, bandwidth=float(e.link.beta),
                ingest=float(e.ingest) if e.ingest else None, price=float(e.link.price),
            )  # fmt: skip
        return graph

    def replace(self, values: Mapping[str, str | float] | None = None, *, price: Mapping[str, str | float] | None = None, beta: Mapping[str, str | float] | None = None) -> Cluster:
        """The same cluster with other numbers, all of them assumed by the caller.

        values: "<device>.<field>", "<link>.<field>" or "<mesh>.count" -> a quantity with its unit, or a number in SI units: "cs3.price",
        "trn2.memory.bandwidth", "trn2.peak.bfloat16", "efa_v3.beta", "efa_v3.ingest". `price` [$/s of one device] by device name and `beta`
        [B/s] by link name say the most usual ones. A new beta also lifts the ingest limit of the edges on that link, so that it is what
        really passes. Raises ProfileError for a name that the cluster does not have, and for a value that is none.
        """
        from partition.overrides import replaced

        if wrong := [v for v in (values, price, beta) if v is not None and not isinstance(v, Mapping)]:
            raise ProfileError(f"{wrong[0]!r} says nothing by name", where=f"cluster {self.name!r}, replace(...)", mend="write replace({'cs3.price': '20 $/h'})")
        said: dict[str, str | float] = dict(values or {})
        said |= {f"{name}.price": value for name, value in (price or {}).items()}
        for name, value in (beta or {}).items():
            said |= {f"{name}.beta": value, f"{name}.ingest": float("inf")}
        return replaced(self, said)

    def at(self, worse: bool) -> Cluster:
        """The same cluster with every number but capacities at the worse (or the better) end of its band: slower and dearer, or faster and cheaper."""
        from partition.overrides import extreme

        return extreme(self, worse)
