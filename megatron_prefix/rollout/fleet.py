"""The servers of a run as rank 0 knows them: which may be asked, which weights each is known to
hold, and which were lost and may be back.

A server is lost where it does not answer, hangs, or answers nonsense. Where a supervisor started it
(``supervisor.py``), it is told so in a file beside the server's address, and starts it again; the
server counts as back once it answers after a new start. It then gets the current weights, with
their checksum compared, before it is asked for a rollout.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import read_endpoints, report_lost
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.protocol import (
    OtherWeights,
    ServerUnavailable,
    SglangError,
    version_label,
)

logger = logging.getLogger(__name__)
UNKNOWN = -1  # no policy version
NOBODY: Mapping[str, float] = MappingProxyType({})
STEADY_S = 600.0  # faults of a server that are further apart are none in a row
_KNOCK_S = 2.0  # for a server that may be there
_POLL_S = 0.2
_TELL_S = 1.0  # between two words that answers are out


@dataclass
class Member:
    """One server. ``lost`` says why it may not be asked; empty: it may."""

    endpoint: Endpoint
    client: SglangClient
    version: int = UNKNOWN
    lost: str = ""
    awaits_start: bool = False  # lost, and back after a new start only
    faults: int = 0  # in a row
    fault_at: float = 0.0


class Fleet:
    """All servers of a run. ``tell`` is told of each loss and each return, in a line. ``waiting``
    is called again and again while servers are waited for, which their own timeouts end."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        rollout: RolloutConfig,
        tell: Callable[[str], None] = logger.warning,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._members = [Member(endpoint, SglangClient(endpoint)) for endpoint in endpoints]
        self._rollout, self._tell, self.waiting = rollout, tell, waiting
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=max(len(endpoints), 1))
        self._alone_since = 0.0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for member in self._members:
            member.client.close()

    def tell_to(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    @property
    def members(self) -> list[Member]:
        """Those that may be asked."""
        return [member for member in self._members if not member.lost]

    def usable(self) -> list[str]:
        return [member.endpoint.url for member in self.members]

    def version(self, url: str) -> int:
        return self._member(url).version

    def meet(self) -> None:
        """Return once every server answers. One that is silent after ``rollout.start_timeout_s`` is
        lost; raises ServerUnavailable where all are."""
        limit_s = self._rollout.start_timeout_s
        deadline = time.monotonic() + limit_s
        for member in self.members:
            while not self._knock(member):
                if time.monotonic() > deadline:
                    asked = member.endpoint
                    words = f"{asked.url} did not answer within {asked.settings}.start_timeout_s"
                    late = ServerUnavailable(f"{words}={limit_s:g}")
                    self.lose(member.endpoint.url, late)
                    break
                self.waiting()
                time.sleep(_POLL_S)
        if not self.members:
            raise late

    def lose(self, url: str, why: SglangError) -> None:
        """Ask it no more until it is back. Its supervisor, if there is one, starts it again,
        unless it is well and only holds other weights."""
        member = self._member(url)
        if member.lost:
            return
        self._count_fault(member)
        member.lost, member.version = str(why), UNKNOWN
        member.awaits_start = bool(member.endpoint.source) and not isinstance(why, OtherWeights)
        if member.awaits_start:
            report_lost(member.endpoint, member.lost)
        self._tell(f"lost the SGLang server at {url}: {why}")

    def doubt(self, why: SglangError, silent: Mapping[str, float] = NOBODY) -> None:
        """Weights may not have come: no server is known to hold any. Those that are not well are
        lost; raises ``why`` where that happened too often in a row. ``silent``: for how many
        seconds a server, by its URL, has answered nothing already."""

        def is_well(member: Member) -> bool:
            left_s = self._rollout.hang_timeout_s - silent.get(member.endpoint.url, 0.0)
            return left_s > 0 and member.client.healthy(left_s)

        for member, stays in zip(self.members, self._of_each(is_well, self.members), strict=True):
            member.version = UNKNOWN
            if not stays:
                self.lose(member.endpoint.url, why)
                continue
            self._count_fault(member)
            if member.faults > self._rollout.server_restarts:
                raise why
        self._tell(f"the weights are sent again: {why}")

    def took(self, members: Sequence[Member], version: int) -> None:
        """They were sent ``version`` whole."""
        for member in members:
            member.version = version

    def in_step(self, version: int) -> bool:
        """Whether every server that answers holds ``version``, and one does at least. False: send
        the weights, or wait for :meth:`expect`."""
        asked = self.members
        for member, label in zip(asked, self._of_each(self._label, asked), strict=True):
            if isinstance(label, SglangError):
                self.lose(member.endpoint.url, label)
            elif label == version_label(member.version):  # as it was given, if not the newest
                continue
            elif label != version_label(version) and member.version != UNKNOWN:
                member.version = UNKNOWN
                member.endpoint = _newer_start(member.endpoint) or member.endpoint
                self._tell(
                    f"the SGLang server at {member.endpoint.url} holds weights {label}, not "
                    f"{version_label(version)}: it gets them anew"
                )
        self._welcome()
        return bool(self.members) and all(member.version == version for member in self.members)

    def expect(self) -> None:
        """Called while no server answers. Raises ServerUnavailable where none can be expected."""
        hopeful = [member for member in self._members if self._may_return(member)]
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        limit = self._rollout.start_timeout_s * (1 + self._rollout.server_restarts)
        if not hopeful or now - self._alone_since > limit:
            words = "; ".join(self.losses())
            raise ServerUnavailable(f"no SGLang server is left: {words}")

    def losses(self) -> list[str]:
        """Why those that may not be asked were lost."""
        return [member.lost for member in self._members if member.lost]

    def _label(self, member: Member) -> str | SglangError:
        """Its ``weight_version``, or why it has none."""
        try:
            info = member.client.model_info(timeout_s=self._rollout.hang_timeout_s, retries=1)
        except SglangError as error:
            return error
        return str(info.get("weight_version"))

    def _welcome(self) -> None:
        """Those that are back, looked at side by side: one that hangs keeps no other away."""
        lost = [member for member in self._members if member.lost and self._may_return(member)]
        for member, endpoint in zip(lost, self._of_each(self._if_back, lost), strict=True):
            if endpoint is not None:
                member.endpoint, member.lost = endpoint, ""
                self._tell(f"the SGLang server at {endpoint.url} is back")
        if self.members:
            self._alone_since = 0.0

    def _of_each[T](self, ask: Callable[[Member], T], members: Sequence[Member]) -> list[T]:
        """Side by side; each answer comes, or is missed, within the settings of the servers."""
        asked = [self._threads.submit(ask, member) for member in members]
        while concurrent.futures.wait(asked, _TELL_S).not_done:
            self.waiting()
        return [future.result() for future in asked]

    def _if_back(self, member: Member) -> Endpoint | None:
        """Its endpoint now; None while it does not answer after a new start."""
        endpoint = self._started_again(member)
        return endpoint if endpoint is not None and self._answers(member) else None

    def _started_again(self, member: Member) -> Endpoint | None:
        """Its endpoint after a new start; as it was where it needs none, or is somebody else's."""
        if not member.awaits_start:
            return member.endpoint
        return _newer_start(member.endpoint)

    def _answers(self, member: Member) -> bool:
        return self._knock(member) and member.client.healthy(self._rollout.hang_timeout_s)

    def _knock(self, member: Member) -> bool:
        try:
            member.client.model_info(timeout_s=_KNOCK_S, retries=0)
        except ServerUnavailable:
            return False
        return True

    def _may_return(self, member: Member) -> bool:
        return member.faults <= self._rollout.server_restarts

    def _count_fault(self, member: Member) -> None:
        now = time.monotonic()
        in_a_row = member.fault_at > 0 and now - member.fault_at < STEADY_S
        member.faults = member.faults + 1 if in_a_row else 1
        member.fault_at = now

    def _member(self, url: str) -> Member:
        return next(member for member in self._members if member.endpoint.url == url)


def _newer_start(endpoint: Endpoint) -> Endpoint | None:
    """The same server, where its supervisor has started it again since."""
    source = Path(endpoint.source)
    entries = read_endpoints(source) if endpoint.source and source.exists() else []
    same = (entry for entry in entries if entry.url == endpoint.url)
    return next((entry for entry in same if entry.start > endpoint.start), None)
