"""vLLM's block pool, which gives up first what is least likely to save work: one rule of value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv.free_queue import KeepingQueue
from vllm_mm_ext.adapters.kv.media_marks import MediaMarks
from vllm_mm_ext.adapters.kv.pool_limits import Limits, Reason
from vllm_mm_ext.adapters.kv.tagging import Tagger, user_of
from vllm_mm_ext.policies.kv.pieces import CachedMedia, Piece, Tree, merge, paths
from vllm_mm_ext.policies.kv.retention import Retention
from vllm_mm_ext.policies.kv.sessions import Sessions

# Of so many blocks one is given up before it is needed.
_AHEAD = 256


class MMExtBlockPool(BlockPool):  # type: ignore[misc]
    """A block pool that gives up first what is least likely to save work.

    Every operation costs O(1) per block, on average.

    Args:
        args, kwargs: Arguments of vLLM's block pool.
        limits: What the pool may keep of media.
        audio_token: The token that stands for sound inside a video item, if the model has one.
        read_ahead: Tokens after a token that a drafter makes the KV of this token of.
    """

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        audio_token: int | None = None,
        read_ahead: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.tree = Tree()
        self.sessions: Sessions[Piece] = Sessions()
        self.retention = Retention(self.sessions, limits.hidden_size)
        self.free_block_queue = KeepingQueue(self.blocks, self._refill)
        # The new list holds all blocks again; the first is the null block, as before.
        assert self.free_block_queue.popleft() is self.null_block
        self._holders = self.free_block_queue.holders
        self._tagger = Tagger(
            self.blocks,
            self._holders,
            # vLLM replaces the map when it resets the cache.
            lambda: self.cached_block_hash_to_block,
            self.tree,
            self.retention,
            self.sessions,
            audio_token,
        )
        self._marks = MediaMarks(self.num_gpu_blocks, read_ahead)
        # How often blocks of a piece were given up since the start, be it media or text.
        self.evictions = 0
        # Groups whose blocks of the request that is being admitted were walked along.
        self._walked: set[int] = set()
        self._last_user: tuple[float, str] | None = None

    def ask_for_outputs(self, held: Callable[[str], bool]) -> None:
        """Say who knows of an mm item, by its identifier, whether its encoder output is held."""
        self.retention.encoded = held

    def true_pressure(self) -> float:
        """Share of the blocks that requests use or that the pool keeps media in, 0 to 1.

        vLLM's own usage counts kept blocks as free: requests that need them get them.
        """
        total = self.num_gpu_blocks - 1
        free = self.free_block_queue.num_free_blocks - self.retention.idle.blocks
        return 1.0 - free / total if total else 0.0

    # --- what blocks hold -------------------------------------------------------------------------

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Cache blocks as vLLM does, and make them part of pieces."""
        super().cache_full_blocks(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            block_mask,
        )
        if num_cached_blocks < num_full_blocks:
            first = num_cached_blocks
            # A request that is being admitted uses what it found, too.
            if not request.num_computed_tokens and kv_cache_group_id not in self._walked:
                self._walked.add(kv_cache_group_id)
                first = 0
            self._tagger.walk(request, blocks, range(first, num_full_blocks), block_size)
            new = range(num_cached_blocks, num_full_blocks)
            self._marks.note(request, ((blocks[i], (i + 1) * block_size) for i in new))

    def cache_partial_block(
        self,
        request: Request,
        block: KVCacheBlock,
        num_tokens: int,
        kv_cache_group_id: int,
        block_size: int,
        replace_existing_hashes: bool = False,
    ) -> BlockHashWithGroupId | None:
        """Cache the first tokens of a block as vLLM does; the pool does not keep them."""
        found: BlockHashWithGroupId | None = super().cache_partial_block(
            request, block, num_tokens, kv_cache_group_id, block_size, replace_existing_hashes
        )
        self._marks.note(request, ((block, num_tokens),))
        return found

    def found(
        self, request: Request, blocks: Sequence[KVCacheBlock], block_size: int, group: int
    ) -> None:
        """Note that a request was admitted with a cached prefix.

        Args:
            request: The request, which uses the blocks by now.
            blocks: The request's cached blocks, from the first on.
            block_size: Tokens per block.
            group: KV cache group.
        """
        if group not in self._walked:
            self._tagger.walk(request, blocks, range(len(blocks)), block_size)

    def admitted(self, request: Request) -> None:
        """Note that a request was admitted, and all that it found was told."""
        self._walked.clear()
        # All answers that one request asks for are one moment of the traffic.
        if (user := user_of(request)) != self._last_user:
            self._last_user = user
            self.retention.history.tick()

    # --- who goes first ---------------------------------------------------------------------------

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blocks as vLLM does, and give up media beyond the limits."""
        taken: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        self._balance()
        return taken

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Note uses as vLLM does; a piece that a request uses cannot be given up."""
        holders, watched = self._holders, self.metrics_collector
        others = []
        taken = 0
        for block in blocks:
            piece = holders[block.block_id]
            if piece is None:
                others.append(block)
                continue
            if not block.ref_cnt:
                taken += 1
                if not piece.busy:
                    self.retention.lift(piece)
                piece.busy += 1
            block.ref_cnt += 1
            if watched:
                watched.on_block_accessed(block)
        super().touch(others)
        self.free_block_queue.keep(-taken)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Free blocks as vLLM does, but keep those of pieces."""
        holders = self._holders
        others, idle = [], []
        given = 0
        # Blocks of several requests may come at once, and shared ones then repeatedly.
        for block in ordered_blocks:
            piece = holders[block.block_id]
            if piece is None:
                others.append(block)
                continue
            block.ref_cnt -= 1
            if not block.ref_cnt:
                given += 1
                piece.busy -= 1
                if not piece.busy:
                    idle.append(piece)
        super().free_blocks(others)
        self.free_block_queue.keep(given)
        for piece in idle:
            self.retention.settle(piece)
        self._balance()

    def settle(self, pieces: Iterable[Piece]) -> None:
        """Note that sessions pin pieces in another way than before."""
        for piece in pieces:
            self.retention.settle(piece)

    def end(self, pieces: Iterable[Piece]) -> None:
        """Stop keeping what only prompts that end in some pieces consist of.

        The blocks stay cached until others take them.
        """
        for end in pieces:
            piece: Piece | None = end
            while (
                piece is not None
                and piece in self.tree
                and not piece.children
                and not self.sessions.ending(piece)
            ):
                before = piece.parent
                self._give_up(piece, len(piece.blocks), Reason.asked)
                piece = before

    def _balance(self) -> None:
        """Give media up beyond what the operator lets the pool keep."""
        queue, limits, idle = self.free_block_queue, self.limits, self.retention.idle
        while idle.items > limits.min_items:
            if idle.blocks > limits.quota:
                reason = Reason.quota
            elif queue.num_free_blocks - idle.blocks < limits.floor and idle.blocks:
                reason = Reason.pressure
            else:
                return
            piece = self.retention.victim(media=True)
            if piece is None:
                return
            self._give_up(piece, len(piece.blocks), reason)

    def _refill(self, num_blocks: int) -> None:
        queue = self.free_block_queue
        # Some more at once, as finding the next piece takes longer the more there are; requests
        # still find what is given up until it is taken.
        wanted = num_blocks + self.num_gpu_blocks // _AHEAD
        while (short := wanted - queue.listed) > 0:
            piece = self.retention.victim()
            if piece is None:
                break
            self._give_up(piece, min(short, len(piece.blocks)), Reason.ranking)
        if queue.listed >= num_blocks:
            return
        # Attention windows free the first blocks of pieces that are in use, or in front of such.
        partly = [piece for piece in self.tree if piece.busy < len(piece.blocks)]
        for piece in sorted(partly, key=lambda piece: -piece.start):
            if queue.listed >= wanted:
                return
            for each in self.tree.descendants(piece):
                self._give_up(each, len(each.blocks), Reason.ranking)

    def _give_up(self, piece: Piece, count: int, reason: Reason) -> None:  # noqa: ARG002 - watched
        """Give the last blocks of a piece without children to the list.

        Args:
            piece: The piece.
            count: How many blocks.
            reason: Why, for who watches the pool.
        """
        holders, blocks = self._holders, self.blocks
        self.evictions += 1
        self.retention.lift(piece)
        given = piece.blocks[-count:][::-1]
        self.tree.cut(piece, count)
        for block_id in given:
            holders[block_id] = None
        freed = [blocks[block_id] for block_id in given]
        if piece.busy:
            freed = [block for block in freed if not block.ref_cnt]
            piece.busy -= len(given) - len(freed)
        if piece.blocks:
            piece.whole = False
            self.retention.settle(piece)
        else:
            self.tree.remove(piece)
            self.sessions.replace(piece, piece.parent)
            self.retention.drop(piece)
            if piece.parent is not None:
                self.retention.settle(piece.parent)
        self.free_block_queue.give_back(freed)

    # --- what else may happen to blocks -----------------------------------------------------------

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Evict blocks as vLLM does, and stop keeping what follows them: no request finds it."""
        for block_id in block_ids:
            self._let_go(block_id)
        super().evict_blocks(block_ids)

    def unpin_blocks(
        self, blocks: Iterable[KVCacheBlock], on_reuse: Callable[[KVCacheBlock], None]
    ) -> None:
        """Unpin blocks as vLLM does, and stop keeping them."""
        blocks = list(blocks)
        for block in blocks:
            self._let_go(block.block_id)
        super().unpin_blocks(blocks, on_reuse)

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        """Move hashes as vLLM does; the pool does not keep the copy."""
        self._let_go(src_block.block_id)
        super().move_block_hashes(src_block, dst_block)
        self._marks.move(src_block.block_id, dst_block.block_id)

    def _let_go(self, block_id: int) -> None:
        piece = self._holders[block_id]
        if piece is None:
            return
        for each in self.tree.descendants(piece):
            if each is not piece:
                self._give_up(each, len(each.blocks), Reason.before)
        self._give_up(piece, len(piece.blocks) - piece.blocks.index(block_id), Reason.asked)

    def reset_prefix_cache(self) -> bool:
        """Empty the cache as vLLM does; returns False, and does nothing, while requests run."""
        if not super().reset_prefix_cache():
            return False
        kept = [block for block in self.blocks if self._holders[block.block_id] is not None]
        self._holders[:] = [None] * len(self._holders)
        self.free_block_queue.give_back(kept)
        self.tree.clear()
        self.retention.clear()
        self.sessions.clear_pieces()
        return True

    def take_down(self, wanted: Callable[[str], bool]) -> set[int]:
        """Take all blocks that depend on some mm items out of the cache; returns their ids.

        Args:
            wanted: Whether an item, named by its identifier, is one of them.
        """
        found = self._marks.depending(wanted, self.blocks)
        self.evict_blocks(found)
        return found

    def let_go(self, pieces: Iterable[Piece]) -> None:
        """Stop keeping pieces and what follows them; they stay cached until others take them."""
        for piece in pieces:
            if piece in self.tree:
                for each in self.tree.descendants(piece):
                    self._give_up(each, len(each.blocks), Reason.asked)

    def holds(self, block_id: int) -> Piece | None:
        """The piece that a block is part of; None for blocks that the pool does not keep."""
        return self._holders[block_id]

    def media(self) -> list[CachedMedia]:
        """The media that are cached, latest use first."""
        # However many sessions there are, most prompts end in the same few pieces.
        alike = Counter(tuple(ends) for _, _, ends in self.sessions.latest())
        sessions: Counter[str | None] = Counter()
        for ends, count in alike.items():
            sessions.update(dict.fromkeys((one.content.identifier for one in paths(ends)), count))
        return merge(self.tree, self.limits.block_bytes, self.limits.hidden_size, sessions)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if blocks, pieces and free list disagree; for tests. O(pool)."""
        queue = self.free_block_queue
        listed = queue.get_all_free_blocks()
        ids = {block.block_id for block in listed}
        assert len(ids) == len(listed) == queue.listed
        holders: list[Piece | None] = [None] * self.num_gpu_blocks
        for piece in self.tree:
            for block_id in piece.blocks:
                assert holders[block_id] is None
                holders[block_id] = piece
            assert piece.busy == sum(self.blocks[i].ref_cnt > 0 for i in piece.blocks)
        assert all(a is b for a, b in zip(holders, self._holders, strict=True))
        kept = 0
        for block in self.blocks:
            held = holders[block.block_id] is not None
            if held:
                assert not block.is_null
                # vLLM drops hashes of Mamba states that requests in progress replace.
                key = block.block_hash
                assert key is None or self.cached_block_hash_to_block.contain(key, block.block_id)
            free = block.ref_cnt == 0 and not block.is_null
            kept += free and held
            assert (block.block_id in ids) == (free and not held), block
        assert kept == queue.kept
        self.tree.check_integrity()
        self.retention.check_integrity(self.tree)
        self.sessions.check_integrity()
