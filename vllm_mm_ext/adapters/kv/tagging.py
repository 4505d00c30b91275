"""Makes blocks of requests part of the pieces of prompts that the pool keeps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_mm_ext.policies.kv.modalities import ModalityMap
from vllm_mm_ext.policies.kv.pieces import TEXT_CONTENT, Content, Piece, Tree
from vllm_mm_ext.policies.kv.placement import runs
from vllm_mm_ext.policies.kv.retention import Retention, kind_of
from vllm_mm_ext.policies.kv.sessions import Sessions, session_key

# How vLLM's names of the answers to one request begin, if it asks for several.
_ANSWER = re.compile(r"\d+_")


def user_of(request: Request) -> tuple[float, str]:
    """What is alike in all the answers that a request asks for (``n``).

    vLLM makes a request of each. Prompts that come together have the same arrival time as well.
    """
    name = request.request_id
    found = _ANSWER.match(name)
    return request.arrival_time, name[found.end() :] if found else name


class Tagger:
    """Walks along the cached blocks of a request and makes those that are new part of pieces.

    Args:
        blocks: All blocks of the pool.
        holders: By block id, the piece that the block is part of.
        cached: vLLM's cached blocks by hash.
        tree: The cached pieces.
        retention: The order in which pieces are given up.
        sessions: Conversations; the tagger tells them how far their prompts reach.
        audio_token: The token that stands for sound inside a video item, if the model has one.
    """

    def __init__(
        self,
        blocks: list[KVCacheBlock],
        holders: list[Piece | None],
        cached: Callable[[], Any],
        tree: Tree,
        retention: Retention,
        sessions: Sessions[Piece],
        audio_token: int | None = None,
    ) -> None:
        self._blocks = blocks
        self._holders = holders
        self._cached = cached
        self._tree = tree
        self._retention = retention
        self._sessions = sessions
        self._audio_token = audio_token

    def walk(
        self, request: Request, blocks: Sequence[KVCacheBlock], indices: range, block_size: int
    ) -> None:
        """Make blocks part of pieces, and note uses of pieces that are there already.

        Requests that computed the same at the same time have a block each; one of them is enough.

        Args:
            request: The request, which uses the blocks.
            blocks: Its blocks, from the first on.
            indices: Indices of the blocks to begin with; those before are part of pieces.
            block_size: Tokens per block.
        """
        start = indices.start
        # Where pieces were given up meanwhile, their blocks are kept again.
        while start and self._same(blocks[start - 1]) is None:
            start -= 1
        way = _Way(request, blocks, block_size)
        if start:
            way.last = self._same(blocks[start - 1])
            assert way.last is not None
            way.enter(self._holders[way.last])
        for feature, run in runs(request.mm_features, range(start, indices.stop), block_size):
            content = TEXT_CONTENT
            if feature is not None:
                offset = feature.mm_position.offset
                content = Content(feature.identifier, feature.modality, offset)
            index: int | None = run.start
            while index is not None and index < run.stop:
                index = self._step(way, content, index, run.stop)
            if index is None:
                break
        self._arrive(way)

    def _step(self, way: _Way, content: Content, index: int, stop: int) -> int | None:
        """Go on over some blocks of one content; returns the next index, None at the end."""
        block = way.blocks[index]
        # Null, or never looked up, as attention has left it behind.
        if block.block_hash is None:
            return index + 1
        same = self._same(block)
        if same is None:
            return self._grow(way, content, index, stop)
        way.last = same
        piece = self._holders[same]
        assert piece is not None
        if piece is not way.piece:
            self._use(piece, way)
            way.enter(piece)
            # The rest of the piece at once.
            rest = index + len(piece.blocks)
            if (
                rest <= stop
                and piece.blocks[0] == same
                and piece.blocks[-1] == way.blocks[rest - 1].block_id
            ):
                way.last = piece.blocks[-1]
                return rest
        return index + 1

    def _arrive(self, way: _Way) -> None:
        """Tell the session how far its prompt reaches, and place idle pieces on the way anew."""
        request = way.request
        if request.session_id is not None and way.piece is not None:
            session = session_key(request.session_id, request.cache_salt)
            other = self._sessions.use(session, way.piece, way.passed, request.arrival_time)
            if other is not None:
                # The piece may be pinned no longer.
                self._retention.settle(other)
        for piece in way.passed:
            if piece.idle:
                self._retention.settle(piece)

    def _same(self, block: KVCacheBlock) -> int | None:
        """The block of a piece that holds the same as a block: itself or an equal one."""
        if block.block_hash is None:
            return None
        if self._holders[block.block_id] is not None:
            return int(block.block_id)
        equal = self._cached().get_one_block(block.block_hash)
        if equal is None or self._holders[equal.block_id] is None:
            return None
        return int(equal.block_id)

    def _use(self, piece: Piece, way: _Way) -> None:
        request = way.request
        again = way.user == piece.last_user or piece.owner == request.request_id
        piece.last_use_s, piece.last_user = time.monotonic(), way.user
        # A preempted request that finds its own blocks again is no new use, nor are all but the
        # first of the answers that a request asks for: nobody came back.
        if not again and not request.num_preemptions:
            piece.hits += 1
            self._retention.history.use(piece.key)

    def _grow(self, way: _Way, content: Content, index: int, stop: int) -> int | None:
        """Add blocks of one content to a piece; returns the index after them.

        Returns None where blocks cannot be kept, as equal ones after them are.
        """
        history, request = self._retention.history, way.request
        key = bytes(way.blocks[index].block_hash)
        piece = way.piece
        if piece is not None and way.last is not None and piece.blocks[-1] != way.last:
            count = piece.blocks.index(way.last) + 1
            if self._blocks[piece.blocks[count]].block_hash is None:
                # A Mamba state was dropped by vLLM, by whose hash the rest would be named.
                return None
            piece = self._split(piece, count)
        if (
            piece is None
            or piece.owner != request.request_id
            or piece.children
            or piece.content != content
            or history.remembers(key)
        ):
            if key in history:
                return None
            piece = self._new(key, content, index, piece, way)
        elif piece.idle:
            # A preempted request computes again what its piece holds.
            self._retention.lift(piece)
        way.enter(piece)
        holders, remembers = self._holders, history.remembers
        first = index
        while True:
            block = way.blocks[index]
            holders[block.block_id] = piece
            piece.blocks.append(block.block_id)
            index += 1
            if index == stop:
                break
            block = way.blocks[index]
            found = block.block_hash
            # No equal block is kept: what is before it would be kept, too.
            if found is None or holders[block.block_id] is not None or remembers(found):
                break
        piece.busy += index - first
        way.last = piece.blocks[-1]
        if content is not TEXT_CONTENT:
            modalities = ModalityMap(
                request.mm_features, request.prompt_token_ids, self._audio_token
            )
            size = piece.block_size
            self._tree.count(piece, modalities.counts(range(first * size, index * size)))
        return index

    def _new(
        self, key: bytes, content: Content, index: int, parent: Piece | None, way: _Way
    ) -> Piece:
        request = way.request
        piece = Piece(key, content, index, way.block_size, parent, request.request_id)
        piece.last_use_s, piece.last_user = time.monotonic(), way.user
        # Where nothing had followed, it is the end of a conversation that goes on.
        goes_on = parent is not None and (parent.owner == request.request_id or not parent.followed)
        kind = kind_of(piece, session=request.session_id is not None)
        self._retention.history.add(key, kind, parent.key if parent and goes_on else None)
        self._tree.add(piece)
        return piece

    def _split(self, piece: Piece, count: int) -> Piece:
        """Cut a piece, as a request goes on in another way; returns the first part."""
        key = self._blocks[piece.blocks[count]].block_hash
        assert key is not None
        self._retention.lift(piece)
        head = self._tree.split(piece, count, bytes(key))
        self._retention.history.divide(head.key, piece.key)
        for block_id in head.blocks:
            self._holders[block_id] = head
            head.busy += self._blocks[block_id].ref_cnt > 0
        piece.busy -= head.busy
        for part in (head, piece):
            self._retention.settle(part)
        return head


class _Way:
    """Where a walk along the blocks of a request has come to.

    Attributes:
        user: As of ``user_of``.
        piece: The piece of the last block.
        last: Id of the last block, or of an equal one that is part of the piece.
        passed: All pieces on the way.
    """

    def __init__(self, request: Request, blocks: Sequence[KVCacheBlock], block_size: int) -> None:
        self.request = request
        self.user = user_of(request)
        self.blocks = blocks
        self.block_size = block_size
        self.piece: Piece | None = None
        self.last: int | None = None
        self.passed: dict[Piece, None] = {}

    def enter(self, piece: Piece | None) -> None:
        """Come to a piece."""
        assert piece is not None
        self.piece = piece
        self.passed[piece] = None
