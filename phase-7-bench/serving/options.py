"""Options of the server: those of generate.py that concern the models, and the server's own."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from engine import Options
from engine.options import DrafterName

# Options of generate.py that a request brings along, or that print.
OF_A_REQUEST = (
    "prompt", "prompt_file", "max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "n",
)  # fmt: skip
OF_THE_TERMINAL = ("beams", "show", "show_tree", "explain", "metrics_detailed", "record", "profile", "as_json")


class ServeOptions(Options):
    """Serve a language model over HTTP, as OpenAI's API does."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all of this machine")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free one")
    api_key: str = Field(default="", description="that every request must bring, as a bearer token; empty: none")
    served_name: str = Field(default="", description="of the model in requests; empty: that of the checkpoint")
    chat_template: Path | None = Field(default=None, description="Jinja file; absent: that of the checkpoint, if any")
    more_drafters: list[DrafterName] = Field(
        default=[],
        description="more drafters, for requests that name one; repeatable; ngram is there unless --draft none",
    )
    max_queue: int = Field(default=256, ge=0, description="samples that wait for a row; more are refused (429)")
    max_body: int = Field(default=8 * 2**20, ge=1024, description="bytes of a request")
    max_new_tokens: int = Field(default=0, ge=0, description="of a request; 0: what the context leaves")
    timeout: float = Field(default=600, gt=0, description="seconds that a request may take in all")
    shutdown_timeout: float = Field(default=10, ge=0, description="seconds to finish running requests after SIGTERM")

    @model_validator(mode="after")
    def _belongs_here(self) -> Self:
        for name in self.model_fields_set & {*OF_A_REQUEST, *OF_THE_TERMINAL}:
            flag = "--" + ("json" if name == "as_json" else name.replace("_", "-"))
            where = "each request says that" if name in OF_A_REQUEST else "the server prints no text"
            raise ValueError(f"{flag} is not an option of the server: {where}")
        if self.kv == "off":
            raise ValueError("--kv off computes every text anew at every step, and is not served")
        if self.draft == "none" and self.more_drafters:
            raise ValueError("--draft none drafts nothing: leave it out, or leave out --more-drafters")
        for name in self.more_drafters:
            if [self.drafter, *self.more_drafters].count(name) > 1:
                raise ValueError(f"--more-drafters {name}: this drafter is named twice, here or by --drafter")
        return self

    @property
    def other_drafters(self) -> list[DrafterName]:
        """List what is loaded besides `--drafter`, for requests that name it."""
        names: list[DrafterName] = [] if self.draft == "none" else [*self.more_drafters, "ngram"]
        return [name for name in dict.fromkeys(names) if name != self.drafter]
