"""vLLM's engine with one gate before its weights.

Weights change through many doors: our gRPC, vLLM's transfer API over HTTP, its
``/collective_rpc``. Between the start and the end of an update a model may be half one
set of weights and half another, or have no weights at all; a token generated then kills
the engine or is wrong without a word. All doors lead through the methods of this class:

- One update at a time. What comes in between is refused (409 over HTTP).
- While the weights are asleep no update begins: they are not in the GPU's memory.
- Generation stands still from an update's start to its end, whether or not the trainer
  has asked for a pause, and cannot be resumed in between. Requests that come meanwhile
  wait. In-flight rollouts go on with the new weights (their cache is computed anew) and
  say which tokens are whose.
- An update that is begun and then left alone is ended after a time.
- If an update leaves weights of which nobody knows what they are, generation is refused
  (503) until an update succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from knapsack_genserver.engine import LoadedWeights
from knapsack_genserver.engines.vllm.plugin import NAME

_LOG = logging.getLogger(__name__)
_MOST = 2**63 - 1

_THROUGH_ROUTES = {
    "init_weight_transfer_engine",
    "shutdown_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "sleep",
    "wake_up",
    "load_model",
    "reset_weights",
}
"""Methods of workers that /collective_rpc may not call past the gate."""


class Refused(GracefulHTTPError):
    """An update, a pause or a request that cannot be served now."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.CONFLICT) -> None:
        super().__init__(message, status)


class UpdateFailed(GracefulHTTPError):
    """An update failed; the message says which weights serve now.

    The status is 400 if the folder is at fault, found before anything was touched, and 500
    if this side is.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message, status)


@dataclass(slots=True)
class Session:
    """An update under way.

    Attributes:
        owner: which door it came through.
        began: on the loop's clock.
        touched: the model has been changed, or may have been.
        complete: what it has been changed to is known and proven.
        taken: it was changed to a folder; the one from before the update can be put back.
        fingerprint: of the folder it was taken from.
        timer: ends it when nothing comes any more; None while a call of it is under way.
    """

    owner: str
    began: float
    touched: bool = False
    complete: bool = False
    taken: bool = False
    fingerprint: str = ""
    timer: asyncio.TimerHandle | None = None


class GatedLLM(AsyncLLM):
    """See the module. ``guard`` must be called before anything else.

    Attributes:
        version: number of the weights that serve.
        broken: why generation is refused; empty if it is not.
        died: set by whoever notices that the engine has died.
        updated: called with (version, seconds, paused seconds or None, whether it failed)
            after each update that its caller does not tell of: all over HTTP.
    """

    version = 0
    broken = ""
    updated: Callable[[int, float, float | None, bool], None] | None = None

    async def guard(
        self, folder: Path, version: int, weights_root: Path | None, mode: str, patience: float
    ) -> LoadedWeights:
        """Begin with the weights of the model's folder.

        Args:
            folder: of the model.
            version: of its weights.
            weights_root: folder that others must lie in, resolved; None for anywhere.
            mode: what an update does with rollouts in flight: keep, wait or abort.
            patience: seconds after which an update that was left alone is ended.
        """
        self._root = weights_root
        self._mode = mode
        self._patience = patience
        self.died = asyncio.Event()
        self._session: Session | None = None
        self._changing = 0
        # The trainer's last pause, if it has not resumed since.
        self._paused: object | None = None
        self._asleep = False
        self._weights_asleep = False
        self._numbers: dict[str, int] = {}
        transfer = self.vllm_config.weight_transfer_config
        self._folders = transfer is not None and transfer.backend == NAME
        fingerprint = ""
        if _holds_weights(folder):
            found = await self._workers("knapsack_hold_weights", str(folder))
            fingerprint = self._found(found[0])
        await self.update_weight_version(str(version))
        return LoadedWeights(self.version, fingerprint)

    def number_of(self, label: str) -> int:
        """Return the number of a weight version's label."""
        return self._numbers.get(label, self.version)

    # Generation.

    async def add_request(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse while nobody knows what the weights are."""
        if self.broken:
            raise Refused(self.broken, HTTPStatus.SERVICE_UNAVAILABLE)
        return await super().add_request(*args, **kwargs)

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Pause; in an update generation stands still already."""
        if self._session is not None and mode == "wait":
            raise self._conflict("cannot wait for rollouts to end")
        # Set before it is so: a resume that comes meanwhile has the last word.
        before, mine = self._paused, object()
        self._paused = mine
        try:
            if self._session is None:
                with self._counted():
                    await super().pause_generation(mode=mode, clear_cache=clear_cache)
            elif mode == "abort":
                await self._abort_all()
        except BaseException:
            if self._paused is mine:
                self._paused = before
            raise

    async def resume_generation(self) -> None:
        """Resume; refused in an update."""
        if self._session is not None:
            raise self._conflict("cannot resume before it is finished")
        self._paused = None
        await super().resume_generation()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the GPU's memory; refused in an update."""
        if self._session is not None:
            raise self._conflict("cannot sleep")
        if level < 1:
            # vLLM's name for a pause that frees nothing; a resume ends it.
            await self.pause_generation(mode=mode, clear_cache=False)
            return
        with self._counted():
            await super().sleep(level, mode)
            self._asleep = self._weights_asleep = True

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Take the GPU's memory back; refused in an update, since it would resume."""
        if self._session is not None:
            raise self._conflict("cannot wake up")
        with self._counted():
            awake = bool(await super().wake_up(tags))
            self._asleep = not awake
            if awake or (tags is not None and "weights" in tags):
                self._weights_asleep = False
            if awake:
                # vLLM has resumed, whoever paused.
                self._paused = None
        return awake

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Let no update begin meanwhile."""
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1

    async def _abort_all(self) -> None:
        requests = self.output_processor
        await self.abort([*requests.request_states, *requests.parent_requests], internal=True)

    # vLLM's transfer API.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """Connect with the trainer."""
        if self._session is not None:
            raise self._conflict("cannot connect anew")
        info = request.init_info
        if self._folders and info.get("root") is not None:
            await self._folder(info["root"])
        await self._workers("init_weight_transfer_engine", info)

    async def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        if self._session is not None:
            raise self._conflict("cannot disconnect")
        await self._workers("shutdown_weight_transfer_engine")

    async def start_weight_update(self) -> None:
        """Begin an update: generation stands still until it is finished."""
        await self._start("start_weight_update")

    async def start_draft_weight_update(self) -> None:
        """Begin an update of the draft model."""
        await self._start("start_draft_weight_update")

    async def _start(self, method: str) -> None:
        session = await self._open("vLLM's transfer API", "keep")
        try:
            if not self._folders:
                await self._workers(method)
            elif method != "start_weight_update":
                raise Refused(f"the backend {NAME} updates no draft model", HTTPStatus.BAD_REQUEST)
        except BaseException:
            await self._close(session)
            raise
        self._wait_for_more(session)

    async def update_weights(self, request: Any) -> None:
        """Take a part of the weights, or a folder with all of them."""
        session = self._go_on("update_weights")
        info = request.update_info
        try:
            if self._folders:
                path = info.get("path") if isinstance(info, dict) else None
                await self._take(session, await self._folder(path))
            else:
                session.touched = True
                await self._workers("update_weights", info)
        except BaseException as error:
            if not self._folders:
                self._break(f"{error}")
            await self._fail(session)
            raise
        self._wait_for_more(session)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update: the new weights serve.

        Args:
            weight_version: label of the new weights. Its last digits are their number; a
                label without any, or none, has the number after the old weights'.
        """
        session = self._go_on("finish_weight_update")
        try:
            if not self._folders:
                await self._workers("finish_weight_update")
                session.complete = session.touched
        except BaseException as error:
            self._break(f"{error}")
            await self._fail(session)
            raise
        try:
            if session.complete:
                await self._commit(session, weight_version or str(self.version + 1))
        finally:
            await asyncio.shield(self._close(session))
        self._tell(session, failed=False)

    async def update_weight_version(self, new_version: str) -> None:
        """Label the weights that serve."""
        digits = re.search(r"(\d+)\D*$", new_version)
        # Python converts no number of thousands of digits.
        number = int(digits.group(1)) if digits and len(digits.group(1)) < 20 else _MOST + 1
        self.version = number if number <= _MOST else self.version + 1
        self._numbers[new_version] = self.version
        await super().update_weight_version(new_version)

    async def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the workers, but not past the gate.

        ``reload_weights`` of a folder is an update like any other, with the next number.
        """
        if method in _THROUGH_ROUTES or str(method).startswith("knapsack"):
            raise Refused(
                f"{method}: would pass by the gate of weight updates; call the route of that name",
                HTTPStatus.BAD_REQUEST,
            )
        if method == "reload_weights":
            path = (kwargs or {}).get("weights_path") or self.model_config.model
            await self._reload(await self._folder(path), self.version + 1)
            return [None]
        if self._session is not None:
            raise self._conflict(f"cannot call {method}")
        return await super().collective_rpc(method, timeout, args, kwargs)

    # Folders.

    async def serve_folder(self, folder: Path, version: int) -> tuple[LoadedWeights, float]:
        """Serve the safetensors of a folder; returns them and for how long it paused.

        Raises:
            Refused: another update is under way.
            UpdateFailed: the old weights serve on, or the message says that none do.
        """
        # Rollouts are given up for a folder that can be served, and not before it is known.
        session = await self._open("UpdateWeights", "wait" if self._mode == "wait" else "keep")
        try:
            await self._take(session, folder, give_up=self._mode == "abort")
            await self._commit(session, str(version))
        finally:
            await asyncio.shield(self._close(session))
        return LoadedWeights(version, session.fingerprint), time.monotonic() - session.began

    async def _reload(self, folder: Path, version: int) -> None:
        """Serve a folder as ``serve_folder`` does, and tell of it."""
        began = time.monotonic()
        paused: float | None = None
        try:
            _, paused = await self.serve_folder(folder, version)
        finally:
            if self.updated is not None:
                self.updated(version, time.monotonic() - began, paused, paused is None)

    async def _take(self, session: Session, folder: Path, give_up: bool = False) -> None:
        """Take a folder; if that fails, what served before the update is put back.

        Args:
            session: under way.
            folder: of weights.
            give_up: rollouts under way, once the folder is found right.
        """
        status, cause = HTTPStatus.INTERNAL_SERVER_ERROR, None
        try:
            refusals = await self._workers("knapsack_check_weights", str(folder))
            reason = next(filter(None, refusals), "")
            if reason:
                status = HTTPStatus.BAD_REQUEST
            else:
                if give_up:
                    await self._abort_all()
                session.touched = session.taken = True
                found = await self._workers("knapsack_take_weights")
                session.complete, session.fingerprint = True, self._found(found[0])
                return
        except Exception as error:
            _LOG.exception("weights of %s were not taken", folder)
            reason, cause = _reason(error), error
        await self._put_back(session, reason)
        # Where that has failed, why they were not taken is in the message already.
        said = self.broken if reason in self.broken else f"{reason}; {self._serving()}"
        raise UpdateFailed(said, status) from cause

    async def _put_back(self, session: Session, reason: str) -> None:
        """Serve what served before the update, if it has taken a folder."""
        if not session.taken:
            return
        session.taken = session.complete = False
        try:
            await self._workers("knapsack_restore_weights")
        except Exception as worse:
            self._break(f"{reason}; and the old ones could not be read: {_reason(worse)}")

    async def _commit(self, session: Session, label: str) -> None:
        """Let the new weights serve under a label, and let go of the old ones."""
        self.broken = ""
        await self.update_weight_version(label)
        if session.taken:
            session.taken = False
            await self._workers("knapsack_release_weights")

    def _serving(self) -> str:
        return self.broken or "the old weights serve on"

    def _found(self, found: dict[str, Any]) -> str:
        fields = {"proven": found["proven"], "unproven": len(found["unproven"])}
        if found["unproven"]:
            fields["for_example"] = found["unproven"][0]
            _LOG.warning("weights not all compared with their source", extra={"fields": fields})
        else:
            _LOG.info("weights compared with their source", extra={"fields": fields})
        return str(found["fingerprint"])

    async def _folder(self, path: object) -> Path:
        if not isinstance(path, str) or not path or "\x00" in path:
            raise UpdateFailed(f"path = {path!r}: must be a folder on the server's disk")
        # A disk that does not answer must not hold up everybody.
        folder = await asyncio.to_thread(Path(path).resolve)
        if self._root and self._root not in (folder, *folder.parents):
            raise UpdateFailed(
                f"path = {path!r}: is outside the server's weights root, {str(self._root)!r}"
            )
        return folder

    # The gate itself.

    async def _open(self, owner: str, mode: str) -> Session:
        if self._session is not None:
            raise self._conflict("cannot begin another one")
        if self._changing:
            raise Refused("a pause, sleep or wake-up is under way; begin when it has ended")
        if self._weights_asleep:
            raise Refused("the weights are asleep; wake them up first (/wake_up?tags=weights)")
        session = self._session = Session(owner, time.monotonic())
        try:
            if mode == "wait" and self._paused is None:
                await super().pause_generation(mode=mode, clear_cache=False)
                session.began = time.monotonic()
            await super().pause_generation(mode="keep", clear_cache=False)
        except BaseException:
            await asyncio.shield(self._close(session))
            raise
        return session

    def _go_on(self, method: str) -> Session:
        """Return the update that a call goes on with; no other call of it comes between."""
        session = self._session
        if session is None:
            raise Refused(f"{method}: start_weight_update must be called before it")
        if session.timer is None:
            raise self._conflict(f"cannot {method} now")
        session.timer.cancel()
        session.timer = None
        return session

    async def _close(self, session: Session) -> None:
        """Let generation go on, unless the trainer has paused it or must not be trusted."""
        await self._put_back(session, "the update was not finished")
        if session.touched:
            await self.reset_prefix_cache(reset_running_requests=True)
            await self.reset_encoder_cache()
        self._session = None
        if self.broken:
            # What waits in the engine would wait for ever.
            await self._abort_all()
        elif self._paused is None and not self._asleep:
            await super().resume_generation()

    async def _fail(self, session: Session) -> None:
        await asyncio.shield(self._close(session))
        self._tell(session, failed=True)

    def _wait_for_more(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        session.timer = loop.call_later(self._patience, self._left_alone, session)

    def _left_alone(self, session: Session) -> None:
        session.timer = None
        task = asyncio.ensure_future(self._give_up(session))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _give_up(self, session: Session) -> None:
        _LOG.error("an update was begun and left alone for %s s; ending it", self._patience)
        if not self._folders:
            try:
                # Without any part received this puts the old weights back.
                await self._workers("finish_weight_update")
            except Exception as error:
                session.touched = True
                _LOG.error("it could not be ended: %s", _reason(error))
            if session.touched:
                self._break("an update was begun and never finished")
        await self._fail(session)

    def _break(self, reason: str) -> None:
        self.broken = f"no weights serve until an update succeeds: {reason}"
        _LOG.critical("%s", self.broken)

    def _tell(self, session: Session, failed: bool) -> None:
        if self.updated is not None and (failed or session.complete):
            seconds = time.monotonic() - session.began
            self.updated(self.version, seconds, seconds, failed)

    def _conflict(self, what: str) -> Refused:
        session = self._session
        assert session is not None
        seconds = time.monotonic() - session.began
        return Refused(
            f"{what}: a weight update through {session.owner} is under way since {seconds:.1f} s"
        )

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; returns their answers."""
        call = asyncio.ensure_future(
            self.engine_core.collective_rpc_async(method, None, args, None)
        )
        # Of an engine that dies meanwhile vLLM never answers.
        death = asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait([call, death], return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise EngineDeadError
            return list(call.result())
        finally:
            call.cancel()
            death.cancel()


def _holds_weights(folder: Path) -> bool:
    """Whether a folder has weights to compare with; a model may have been made without."""
    return any(folder.glob("*.safetensors"))


def _reason(error: BaseException) -> str:
    """Return what a worker said, without the engine's frame around it."""
    text = str(error).strip()
    text = re.sub(r"^Call to \w+ method failed: ", "", text)
    return text or type(error).__name__
