"""One loaded model: its weights, its usual lane of slots, and larger lanes made on demand."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from rustllama import bridge
from rustllama.core import EngineState, GenerateRequest, LoadOptions, MemoryPlan, ModelRecord, Span
from rustllama.engine import attention, memory
from rustllama.engine.black_box import BlackBox, Witness
from rustllama.engine.decode_cost import DecodeCost
from rustllama.engine.disk_store import DiskStore
from rustllama.engine.facts import Facts
from rustllama.engine.lane import Lane, LaneShape, LaneStream
from rustllama.engine.machine import physical_cores
from rustllama.engine.native import BUILD, Model, gpu_layers, listen, plain_is_faster
from rustllama.engine.neighbours import Neighbours
from rustllama.engine.prefix_store import PrefixStore, StoreState
from rustllama.engine.prompt_cost import FLASH_TILE, PromptCost
from rustllama.engine.recall import Recall
from rustllama.engine.scheduler import Scheduler
from rustllama.engine.sharing import Sharing
from rustllama.engine.shelf import Shelf
from rustllama.engine.state_folder import StateFolder
from rustllama.engine.states import Cuts, Shape, Tokens, as_tokens
from rustllama.engine.tally import Tally
from rustllama.engine.threads import Threads
from rustllama.engine.turns import Share, Turns
from rustllama.errors import OutOfMemory, RustllamaError, Unsupported
from rustllama.gguf.architectures import can_shift
from rustllama.settings import Settings

_LARGE_LANE_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What the engines of a process have in common."""

    settings: Settings
    facts: Facts
    native: bridge.NativeThreads
    turns: Turns
    store: PrefixStore
    disk: DiskStore
    tally: Tally
    box: BlackBox
    neighbours: Neighbours = field(default_factory=Neighbours)


class LlamaEngines:
    """Makes engines that share one native thread, so that no two models compute at once on the same cores, and take
    turns in it.
    """

    def __init__(self, settings: Settings, facts: Facts | None = None, box: BlackBox | None = None) -> None:
        store = PrefixStore(memory.prompt_cache_bytes(settings))
        disk = DiskStore(StateFolder(settings.prompts_path, settings.prompt_cache_disk, BUILD), store)
        self.tally = Tally()
        native, box = bridge.NativeThreads(1), box or BlackBox()
        self._shared = Shared(settings, facts or Facts(), native, Turns(), store, disk, self.tally, box)
        listen(box.say)

    @property
    def prompt_cache_bytes(self) -> int:
        return self._shared.store.limit_bytes

    def __call__(
        self, record: ModelRecord, options: LoadOptions, plan: MemoryPlan, tell: Callable[[float], None] | None = None
    ) -> LlamaEngine:
        """See `manager.EngineFactory`."""
        return LlamaEngine(record, options, plan, self._shared, tell)

    def prefers_plain_attention(self, record: ModelRecord, options: LoadOptions) -> bool:
        """See `manager.EngineFactory`. Measured at the first load, in the native thread between the calls of others;
        kept for good, as the two ways round differently.
        """
        shared, settings = self._shared, self._shared.settings
        if not attention.is_open(settings.flash_attention, _num_gpu(record, options, settings)):
            return False
        kind = settings.kv_cache_type
        n_threads = min(_num_thread(options, settings), physical_cores())  # more wait for each other, for ever so long
        name = f"plain_attention {_machine(n_threads)} kv_cache_type={kind}"
        known = shared.facts.get(record.digest, name, bool)
        if known is None:
            call = shared.native.call
            known = plain_is_faster(record.info, n_threads=n_threads, kv_cache_type=kind, call=call)
            shared.facts.keep(record.digest, name, known)
        return known

    def stores(self) -> tuple[StoreState, ...]:
        store, disk = self._shared.store, self._shared.disk
        return (store.state(), disk.state()) if self._shared.settings.prompt_cache_disk else (store.state(),)

    def forget(self, digest: str) -> None:
        self._shared.store.forget(digest)
        self._shared.disk.forget(digest)

    def flush(self) -> None:
        self._shared.disk.flush()


class LlamaEngine:
    """See `core.Engine`."""

    def __init__(
        self,
        record: ModelRecord,
        options: LoadOptions,
        plan: MemoryPlan,
        shared: Shared,
        tell: Callable[[float], None] | None,
    ) -> None:
        settings = shared.settings
        self._info = record.info
        self._digest = record.digest
        self._shared = shared
        self._share = Share(shared.turns)
        self._tally = shared.tally.models[record.name]
        self._plan = plan
        self._settings = settings
        self._n_threads = _num_thread(options, settings)
        self._n_batch = options.num_batch or settings.num_batch
        self._num_gpu = _num_gpu(record, options, settings)
        use_mmap = settings.use_mmap if options.use_mmap is None else options.use_mmap
        self._attentions = ("off", settings.flash_attention) if plan.plain_attention else (settings.flash_attention,)
        self._lanes: list[Lane] = []  # the usual one first
        self._witness = Witness(shared.box, record)
        with ExitStack() as undo:
            undo.callback(self._witness.unmark)
            self._model = bridge.offload(Model, record.path, num_gpu=self._num_gpu, use_mmap=use_mmap, tell=tell)
            undo.callback(self._model.close)
            self._lanes.append(self._open(plan.n_ctx, plan.n_slots, self._attentions[0]))
            undo.pop_all()
        self._witness.loaded()

    def tokenize(
        self, spans: tuple[Span, ...], *, add_special: bool, as_written: bool = True, owner: str = ""
    ) -> tuple[int, ...]:
        return bridge.offload(self._tokenize, spans, add_special, self._known(owner) if as_written else [])

    def reserve(self, num_ctx: int, available_bytes: int) -> None:
        self._close_idle_lanes()
        if self._lane_for(num_ctx) is not None:
            return
        n_ctx = memory.padded(min(_power_of_two(num_ctx), self._info.context_length))
        needed = {way: self._large_lane_bytes(n_ctx, way) for way in self._attentions}
        fitting = [way for way in self._attentions if needed[way] <= available_bytes]
        if not fitting:
            raise OutOfMemory(
                f"a context of {num_ctx} tokens needs {memory.gib(min(needed.values()))} more memory, and "
                f"{memory.gib(available_bytes)} are free: ask for a smaller num_ctx."
            )
        self._lanes.append(self._open(n_ctx, 1, fitting[0]))

    def check_room(self, num_ctx: int) -> None:
        self._lane_of(num_ctx).check_room()

    def submit(self, request: GenerateRequest) -> LaneStream:
        if request.shift is not None:
            self._check_shift(request)
        return self._lane_of(request.num_ctx).submit(request, self._tally, self._settings.request_timeout)

    def _check_shift(self, request: GenerateRequest) -> None:
        if not can_shift(self._info) or not self._lanes[0].can_shift:
            raise Unsupported("'shift' is not possible with this model: send the request without it.", "shift")
        if request.reproducible:
            raise Unsupported("'shift' is not possible in a reproducible answer: ask for one of the two.", "shift")

    def state(self) -> EngineState:
        large = [self._large_lane_bytes(lane.shape.n_ctx, lane.shape.flash_attention) for lane in self._lanes[1:]]
        size = self._plan.size_bytes + sum(large)
        layers = self._info.block_count + 1
        return EngineState(
            context_length=self._plan.n_ctx,
            slots=sum(lane.shape.n_slots for lane in self._lanes),
            running=sum(lane.running for lane in self._lanes),
            queued=sum(lane.queued for lane in self._lanes),
            size_bytes=size,
            size_vram_bytes=size * min(self._num_gpu, layers) // layers,
            cells=sum(lane.shape.n_ctx * lane.shape.n_slots for lane in self._lanes),
            cells_used=sum(lane.cells_used for lane in self._lanes),
            decode_ms=self._lanes[0].decode_ms,
            unmeasured=self._lanes[0].unmeasured,
        )

    def end_all(self, reason: RustllamaError) -> None:
        for lane in self._lanes:
            lane.end_all(reason)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        bridge.offload(self._model.close)
        self._witness.unmark()
        bridge.spawn(lambda: self._shared.disk.flush(self._digest))

    def check_integrity(self) -> None:
        """See `Lane.check_integrity`."""
        for lane in self._lanes:
            lane.check_integrity()
        self._shared.store.check_integrity()
        self._shared.disk.check_integrity()

    def _large_lane_bytes(self, n_ctx: int, flash_attention: str) -> int:
        return memory.large_lane_bytes(self._info, replace(self._settings, flash_attention=flash_attention), n_ctx)

    def _open(self, n_ctx: int, n_slots: int, flash_attention: str) -> Lane:
        settings = self._settings
        may_draft, numbers = settings.speculation and Cuts.of(self._info) == Cuts(), settings.kv_cache_type
        shape = LaneShape(n_ctx, n_slots, self._n_batch, self._n_threads, may_draft, flash_attention, numbers)
        context, sharing = bridge.offload(shape.open, self._model), Sharing(self._shelf(shape))
        decode_cost = self._decode_cost(shape)
        scheduler = Scheduler(
            n_slots,
            self._n_batch,
            settings.max_queue,
            settings.gap_ms,
            sharing,
            decode_cost=decode_cost,
            prompt_cost=PromptCost(1 if flash_attention == "off" else FLASH_TILE, decode_cost),
        )
        threads = Threads(self._n_threads, self._shared.neighbours, on_gpu=self._model.on_gpu)
        return Lane(context, shape, scheduler, self._shared.native, self._share, self._witness, threads)

    def _decode_cost(self, lane: LaneShape) -> DecodeCost:
        """Begins with what was measured before, by the same build on the same machine."""
        facts, name = self._shared.facts, f"decode_ms {_machine(self._n_threads)} gpu={self._num_gpu} "
        name += f"flash_attention={lane.flash_attention} kv_cache_type={lane.kv_cache_type}"
        known = facts.get(self._digest, name, list[float]) or []
        return DecodeCost(lane.n_slots, known, lane.may_draft, complete=lambda ms: facts.keep(self._digest, name, ms))

    def _shelf(self, lane: LaneShape) -> Shelf | None:
        store, disk = self._shared.store, self._shared.disk if self._settings.prompt_cache_disk else None
        if not store.limit_bytes:
            return None
        shape = Shape(self._digest, lane.n_ctx, lane.n_slots, lane.flash_attention, lane.kv_cache_type)
        cuts = Cuts.of(self._info)
        if disk is not None:
            disk.open(shape, cuts)
        return Shelf(store, shape, cuts, memory.token_bytes(self._info, self._settings), disk)

    def _lane_of(self, num_ctx: int) -> Lane:
        lane = self._lane_for(num_ctx)
        assert lane is not None, "a request is larger than every slot: reserve() comes first"
        return lane

    def _lane_for(self, num_ctx: int) -> Lane | None:
        fitting = [lane for lane in self._lanes if lane.shape.n_ctx >= num_ctx]
        return min(fitting, key=lambda lane: lane.shape.n_ctx, default=None)

    def _close_idle_lanes(self) -> None:
        long_ago = time.monotonic() - _LARGE_LANE_IDLE_S
        for lane in self._lanes[1:]:
            if not lane.running and not lane.queued and lane.idle_since_s < long_ago:
                self._lanes.remove(lane)
                lane.close()

    def _known(self, owner: str) -> list[Tokens]:
        """All that the model wrote for this owner, with what was said to it."""
        if not self._settings.reuse_text:
            return []
        ended = (s for lane in self._lanes for s in lane.ended if not s.dropped and s.request.owner == owner)
        kept = (saved for saved in self._shared.store if saved.shape.digest == self._digest)
        saved = [saved.tokens for saved in kept if saved.shape.owner == owner]
        return [*(as_tokens(s.tokens) for s in ended), *saved, *self._shared.disk.known(self._digest, owner)]

    def _tokenize(self, spans: tuple[Span, ...], add_special: bool, known: list[Tokens]) -> tuple[int, ...]:
        """What the model wrote stays as it wrote it: see `recall`."""
        tokens: list[int] = []
        for span in spans:
            tokens += self._model.tokenize(span.text, parse_special=span.trusted)
        bos = self._model.leading_bos if add_special else None
        if bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tuple(Recall(known, self._model.answer_piece).rewrite(tokens))


def _machine(n_threads: int) -> str:
    """What a measured time holds for, in the name of a fact."""
    return f"{BUILD} {platform.node()} threads={n_threads}"


def _num_thread(options: LoadOptions, settings: Settings) -> int:
    return options.num_thread or settings.num_thread or physical_cores()


def _num_gpu(record: ModelRecord, options: LoadOptions, settings: Settings) -> int:
    """Layers."""
    return gpu_layers(record.info, settings.num_gpu if options.num_gpu is None else options.num_gpu)


def _power_of_two(number: int) -> int:
    """The next power of two: requests of like sizes share a lane."""
    return 1 << (number - 1).bit_length()
