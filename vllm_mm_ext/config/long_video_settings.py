"""Settings of long video: the section ``mm_ext.long_video``, and what a request may ask.

A long video is shown to the model window by window; notes about the windows answer the question
(``long_video/``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_mm_ext.config.section import Section

Strategy = Literal["auto", "single", "rolling", "map_reduce", "search"]


class LongVideoOptions(BaseModel):
    """How a question about long videos is answered. What is left out is as configured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy | None = Field(
        None,
        description="`single`: all videos in one prompt, as without this option. `rolling`: "
        "windows in order, each with the notes of the two before it. `map_reduce`: a note about "
        "each window, in parallel, then an answer from all notes. `search`: a first look at every "
        "window, a second, closer one at those that matter to the question. `auto`: `single` "
        "where the videos fit at the frame rate asked; `map_reduce` where at most `close_windows` "
        "windows have no note yet, or more than that or none seem to matter; else `search`.",
    )
    window_s: float | None = Field(None, ge=4, le=600, description="Seconds of a window.")
    overlap_s: float | None = Field(
        None,
        ge=0,
        le=60,
        description="Seconds that a window shares with the next one; at most half a window.",
    )
    fps: float | None = Field(
        None, gt=0, le=60, description="Frames per second within a window, before the limits apply."
    )
    max_parallel: int | None = Field(
        None, ge=1, le=64, description="Windows that are looked at at once."
    )
    max_windows: int | None = Field(
        None, ge=1, le=16384, description="Windows at most; more are a 400 that says what fits."
    )
    total_tokens: int | None = Field(
        None,
        ge=1,
        le=1 << 30,
        description="Prompt tokens that all windows may take together. What would go past is not "
        "looked at, and named in the answer.",
    )
    time_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="Seconds after which no further window is looked at; those left out are named "
        "in the answer.",
    )


class PromptSettings(Section):
    """What the model is told. A model that was trained on other words wants those."""

    note: str = Field(
        "Note what can be seen and heard in this part of a longer video, in the order in which it "
        "happens. Begin each thing with the second at which it begins, in square brackets, like "
        "[12]. Be brief and exact; name people, things, colours, actions, text and sounds.",
        min_length=1,
        description="Asks for a note about a window. The note may not depend on the question, as "
        "notes are kept for later questions.",
    )
    earlier: str = Field(
        "Before this part: {notes}\n",
        min_length=1,
        description="`rolling`: tells the notes of the windows before, `{notes}`; stands before "
        "`note`.",
    )
    relevance: str = Field(
        "{question}\nIs what is asked to be seen or heard in this part of the video? Answer yes or "
        "no.",
        min_length=1,
        description="`search`: asks whether a window matters to the question, `{question}`.",
    )
    yes: str = Field(
        "yes", min_length=1, description="The answer to `relevance` that says it does."
    )
    no: str = Field("no", min_length=1, description="The answer that says it does not.")
    select: str = Field(
        "These are notes about a video, each with its time. Copy those that matter to the "
        "question below, word by word, with their times, and nothing else.\n{notes}\n"
        "Question: {question}",
        min_length=1,
        description="Asks which of some notes matter; `{notes}` and `{question}` stand for those.",
    )
    answer: str = Field(
        "These are notes about {what}, each with the time at which it begins in square brackets:\n"
        "{notes}",
        min_length=1,
        description="Stands in the conversation where the video stood; `{notes}` are the notes "
        "that matter, `{what}` is `the video`, or `video 2` where there are several.",
    )

    @model_validator(mode="after")
    def _places(self) -> PromptSettings:
        wanted = {
            "earlier": ("notes",),
            "relevance": ("question",),
            "select": ("notes", "question"),
            "answer": ("notes",),
        }
        for name, places in wanted.items():
            missing = [p for p in places if "{" + p + "}" not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} must hold {{{missing[0]}}}")
        return self


class LongVideoSettings(Section):
    """Questions about videos that do not fit the context, answered window by window.

    A request asks for it with `mm_ext.long_video`; its values are bounded by these.
    """

    default: Literal["off", "auto", "single", "rolling", "map_reduce", "search"] = Field(
        "off",
        description="Strategy of chat completions with a video that do not ask for long video; "
        "`off`: they are answered in one prompt.",
    )
    window_s: float = Field(30.0, ge=4, le=600, description="Seconds of a window.")
    overlap_s: float = Field(
        2.0, ge=0, le=60, description="Seconds that a window shares with the next one."
    )
    max_parallel: int = Field(
        4, ge=1, le=64, description="Windows of one request that are looked at at once, at most."
    )
    max_windows: int = Field(2048, ge=1, le=16384, description="Windows of one request at most.")
    max_requests: int = Field(
        4, ge=1, le=1024, description="Requests at once in this API server; others get a 503."
    )
    priority: int = Field(
        10,
        ge=0,
        le=1 << 20,
        description="Added to the priority of a request's windows, so that they come after other "
        "requests (`--scheduling-policy priority`).",
    )
    note_tokens: int = Field(192, ge=8, le=4096, description="Tokens of a note at most.")
    select_tokens: int = Field(
        6000,
        ge=64,
        le=1 << 20,
        description="Tokens of notes in one prompt at most, where notes are sorted out; the "
        "context bounds them as well.",
    )
    coarse_frames: int = Field(
        8,
        ge=1,
        le=512,
        description="`search`: frames of a window in the first look. A model that learned token "
        "reductions gets the strongest of them there.",
    )
    close_fps: float = Field(
        4.0, gt=0, le=60, description="`search`: frames per second in the second look."
    )
    close_windows: int = Field(
        12,
        ge=1,
        le=1024,
        description="`search`: windows that get a second look. Where more matter, or none "
        "seems to, `auto` notes all.",
    )
    notes_mb: int = Field(64, ge=1, le=65536, description="MiB of notes that are kept.")
    notes_ttl_s: float = Field(
        86400.0, gt=0, le=30 * 86400, description="Seconds for which a note is kept."
    )
    prompts: PromptSettings = Field(default_factory=PromptSettings)

    @model_validator(mode="after")
    def _overlap(self) -> LongVideoSettings:
        if self.overlap_s > self.window_s / 2:
            raise ValueError(
                f"overlap_s ({self.overlap_s}) must not exceed half of window_s ({self.window_s})"
            )
        return self
