"""What a run is and where: `run` in its folder of the bucket, key=value lines, and a copy on this machine."""

import dataclasses
import math
import os
import re
import secrets
from pathlib import Path

from ..slices import Topology, find
from . import options
from .options import Options
from .terminal import UsageError, quoted

STATE = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "tpu_pod"

# What a record may hold. It is data that others can write to: nothing of it is executed, and every value is one that
# the options would have allowed.
PATTERNS = {
    "NAME": options.NAME,
    "RUN_ID": "[0-9a-f]{16}|",
    "PROJECT": options.PROJECT,
    "ZONE": options.ZONE,
    "TYPE": "[a-z0-9]+-[0-9]+",
    "ZONES": f"({options.ZONES})?",
    "LEFT_ZONES": f"({options.ZONES})?",
    "TYPES": "([a-z0-9]+-[0-9]+(,[a-z0-9]+-[0-9]+)*)?",
    "SLICES": "[1-9][0-9]{0,4}",
    "TIER": "|".join(options.TIERS),
    "BUCKET": options.BUCKET,
    "WORKDIR": options.FOLDER,
    "DATA": options.FOLDER,
    "MAX_ATTEMPTS": "[1-9][0-9]{0,4}",
    "MAX_HOURS": "[1-9][0-9]{0,4}",
    "PRICE": f"({options.PRICE})?",
    "VALID_UNTIL": f"({options.DURATION})?",
    "NETWORK": f"({options.NETWORK})?",
    "SUBNETWORK": f"({options.NETWORK})?",
    "SERVICE_ACCOUNT": f"({options.EMAIL})?",
    "INTERNAL_IPS": "1?",
    "TUNNEL_THROUGH_IAP": "1?",
    "RUNTIME_VERSION": f"({options.RUNTIME})?",
    "OWNER": f"({options.EMAIL})?",
    "TREE": "[0-9a-f]{40,64}",
    "COMMIT": "[0-9a-f]{40,64}",
    "CODE_SHA256": "[0-9a-f]{64}|",
    "FLAGS_SHA256": "[0-9a-f]{64}|",
}


@dataclasses.dataclass
class Run:
    """A run that was checked or recorded."""

    name: str
    project: str
    zone: str
    type: str
    slices: int
    tier: str
    bucket: str
    workdir: str
    data: str
    max_attempts: int
    max_hours: int
    price: str = ""  # dollars per chip and hour
    zones: str = ""  # to try in turn, with commas between
    types: str = ""
    left_zones: str = ""  # that it was in before
    valid_until: str = ""  # a duration of gcloud's
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    internal_ips: bool = False
    tunnel_through_iap: bool = False
    runtime_version: str = ""  # the VM image, if not that of the type
    owner: str = ""  # the account that submitted it last
    tree: str = ""
    commit: str = ""
    code_sha256: str = ""  # of the archive that the hosts load
    flags_sha256: str = ""  # of trainer.args
    run_id: str = ""  # random: the label by which a slice is known to be this run's

    @property
    def topology(self) -> Topology:
        """Of one slice. Raises UsageError for a type that no submit wrote."""
        try:
            return find(self.type)
        except ValueError as error:
            raise UsageError(f"the record of {self.name} names no slice type; delete that file") from error

    @property
    def hosts(self) -> int:
        return self.topology.num_hosts * self.slices

    @property
    def chips(self) -> int:
        return self.topology.num_chips * self.slices

    @property
    def rate(self) -> tuple[float, str]:
        """Dollars per chip and hour, 0 where nobody knows, and whose price that is: --price or the list's."""
        if self.price:
            return float(self.price), f"${self.price} per chip-hour"
        dollars, date = self.topology.list_price
        return dollars, f"the list price of {date}, ${dollars:.2f} per chip-hour on demand"

    @property
    def url(self) -> str:
        return f"{self.bucket}/runs/{self.name}"

    @property
    def local(self) -> Path:
        return STATE / "runs" / self.name

    @property
    def place(self) -> list[str]:
        return [f"--project={self.project}", f"--zone={self.zone}"]

    @property
    def places(self) -> list[tuple[str, str]]:
        """Zones and types to try, one after another, when there are no machines."""
        zones, types = self.zones or self.zone, self.types or self.type
        return [(zone, find(name).accelerator_type) for name in types.split(",") for zone in zones.split(",")]

    @property
    def other_zones(self) -> list[str]:
        """Where a request of the run may come late, which was on its way when the run moved."""
        zones = [*(zone for zone, _ in self.places), *self.left_zones.split(",")]
        return [zone for zone in dict.fromkeys(zones) if zone not in ("", self.zone)]

    def node(self, index: int) -> str:
        """The node of a slice; several are numbered by the service in this way."""
        return self.name if self.slices == 1 else f"{self.name}-{index}"

    def text(self) -> str:
        values = {key: getattr(self, key.lower()) for key in PATTERNS}
        return "".join(f"{key}={'1' if value is True else value or ''}\n" for key, value in values.items())


def _hours(given: Options) -> int:
    """Those of --max-hours, or fewer by --max-cost. Raises UsageError if not even one is affordable."""
    hours = int(given.max_hours)
    if not given.max_cost:
        return hours
    wanted = [find(name) for name in (given.types or given.type).split(",")]
    for topology in wanted:
        if not given.price and not topology.list_price[0]:
            raise UsageError(f"--max-cost needs --price: no list price of {topology.generation} is known")
    prices = [(t.num_chips * int(given.slices), float(given.price or t.list_price[0])) for t in wanted]
    chips, price = max(prices, key=lambda chips_and_price: math.prod(chips_and_price))
    affordable = int(int(given.max_cost) / (chips * price))
    if affordable < 1:
        raise UsageError(f"--max-cost={given.max_cost} is less than an hour of {chips} chips at ${price:g}")
    return min(hours, affordable)


def from_options(given: Options) -> Run:
    """The run that checked options describe."""
    return Run(
        name=given.name,
        project=given.project,
        zone=given.zone,
        type=find(given.type).accelerator_type,
        slices=int(given.slices),
        tier=given.tier,
        bucket=given.bucket,
        workdir=given.workdir,
        data=given.data,
        max_attempts=int(given.max_attempts),
        max_hours=_hours(given),
        price=given.price,
        zones=given.zones,
        types=given.types,
        valid_until=given.valid_until,
        network=given.network,
        subnetwork=given.subnetwork,
        service_account=given.service_account,
        internal_ips=given.internal_ips,
        tunnel_through_iap=given.tunnel_through_iap,
        runtime_version=given.runtime_version,
        run_id=secrets.token_hex(8),
    )


def parse(text: str, source: str) -> Run:
    """The run of a record.

    Raises:
      UsageError: a value that no submit wrote.
    """
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key not in PATTERNS:
            continue
        if not options.matches(value, PATTERNS[key]):
            raise UsageError(
                f"the record {source} holds {key}={quoted(value)}, which no submit wrote; delete that file"
            )
        values[key.lower()] = value
    needed = ("name", "project", "zone", "type", "slices", "tier", "bucket", "max_attempts", "max_hours")
    for key in needed:
        if key not in values:
            raise UsageError(f"the record {source} holds no {key.upper()}; delete that file")
    run_url = f"{values['bucket']}/runs/{values['name']}"
    numbers = {key: int(values.pop(key)) for key in ("slices", "max_attempts", "max_hours")}
    switches = {key: bool(values.pop(key, "")) for key in ("internal_ips", "tunnel_through_iap")}
    run = Run(**({"workdir": f"{run_url}/workdir", "data": ""} | values), **numbers, **switches)  # type: ignore[arg-type]
    _ = run.topology
    return run


def load(file: Path) -> Run:
    return parse(file.read_text(errors="replace"), str(file))


def duration(text: str) -> float:
    """Seconds of a duration as 2h30m."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"([0-9]+)([smhd])", text))
