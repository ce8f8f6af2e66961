"""Text to token ids and back, and text as it streams.

`tokenizer.json` is read with the `tokenizers` package, which loads in milliseconds. transformers takes seconds to load,
so it is imported only for a folder without tokenizer.json (OPT, for one), to build one from its other files. A
SentencePiece model is converted in common/sentencepiece_model.py.

    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    tokenizer.decode(tokenizer.encode("import re"))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from common.errors import UserError
from common.files import one_line, read_json, shown

REPLACEMENT = "\ufffd"  # written for bytes that are not (yet) a character
SENTENCEPIECE_BYTE = re.compile("<0x..>")
SENTENCEPIECE = "tokenizer.model"
PARTS = ("vocab.json", "vocab.txt")  # with any of these a tokenizer can be built


class Tokenizer:
    """A checkpoint's tokenizer, and the special ids that a decoding loop needs."""

    def __init__(self, backend: Backend, bos_id: int | None, eos_ids: tuple[int, ...]) -> None:
        # A file can cut or pad texts to some length. That is for training; here no token may be lost.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        added = backend.get_added_tokens_decoder()
        self._first: list[int] = []  # prepended to every text; most tokenizers use their template instead
        self._limit: int | None = None
        self._model = "the model"
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], generation_config: dict[str, Any]) -> Tokenizer:
        """Load the tokenizer in a checkpoint's folder.

        Its begin and end tokens are those of `generation_config`, else of `config`, else of tokenizer_config.json, else
        of a SentencePiece model.
        Raises UserError, naming the folder, if the files are missing or damaged.
        """
        path = folder / "tokenizer_config.json"
        tokenizer_config = read_json(path) if path.is_file() else {}
        backend, names = _load_backend(folder, tokenizer_config)

        def ids(kind: str) -> tuple[int, ...]:
            for source in (generation_config, config):
                found = source.get(f"{kind}_token_id")
                found = [found] if isinstance(found, int) else found
                if found:
                    if not isinstance(found, list) or not all(map(_is_id, found)):
                        raise UserError(f"{folder}: {kind}_token_id should be a token id or a list, got {shown(found)}")
                    return tuple(found)
            token_id = own(kind)
            return () if token_id is None else (token_id,)

        def own(kind: str) -> int | None:
            token = tokenizer_config.get(f"{kind}_token", names.get(f"{kind}_token"))
            spelled = token.get("content") if isinstance(token, dict) else token
            return backend.token_to_id(spelled) if isinstance(spelled, str) else None

        tokenizer = cls(backend, next(iter(ids("bos")), None), ids("eos"))
        if tokenizer_config.get("add_bos_token") is True and not backend.num_special_tokens_to_add(False):
            first = own("bos")
            first = tokenizer.bos_id if first is None else first
            if first is None:
                raise UserError(f"{folder}: add_bos_token of tokenizer_config.json is true, and no bos_token is named")
            tokenizer._first = [first]
        return tokenizer

    def refuse_from(self, limit: int, model: str) -> None:
        """Refuse, by UserError, encoded ids that a model of `limit` tokens does not have."""
        self._limit, self._model = limit, model

    @cached_property
    def vocab_size(self) -> int:
        """Return the highest id plus one, added tokens included. A model's logits can be wider, never narrower."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Return every token as the vocabulary spells it, by id, added tokens included."""
        return {token_id: piece for piece, token_id in self._backend.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that this tokenizer adds to one (Llama 2: a begin token).

        If the file's template adds none, `add_bos_token` of tokenizer_config.json decides (DeepSeek). special: False
        for a text that has its special tokens already, as a chat template writes them.
        """
        _refuse_surrogates(text)
        with self._encoding():
            ids = self._backend.encode(text, add_special_tokens=special).ids
        return self._checked(ids, special)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts like `encode`, on all cores; character offsets are not recorded."""
        for text in texts:
            _refuse_surrogates(text)
        with self._encoding():
            encodings = self._backend.encode_batch_fast(texts)
        return [self._checked(encoding.ids) for encoding in encodings]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Raise UserError for a text that cannot be encoded, which is possible without an unknown token."""
        try:
            yield
        except Exception as error:  # the package raises no narrower type
            raise UserError(f"{self._model}: the tokenizer cannot encode the text ({one_line(error)})") from None

    def _checked(self, encoded: list[int], special: bool = True) -> list[int]:
        ids = self._first + encoded if special else encoded
        if self._limit is not None and max(ids, default=0) >= self._limit:
            raise UserError(
                f"{self._model}: the text holds token {max(ids)} ({self.piece(max(ids))!r}), and the model has only "
                f"{self._limit} tokens; the tokenizer is another model's, or the token an added one: leave it out"
            )
        return ids

    def joins_next(self, text: str) -> bool:
        """Return whether a text ends in white space that this tokenizer would join to the next word.

        Most tokenizers have ` word` as one token, so a model has hardly seen a separate space before a word.
        """
        end = text[-16:]
        if not end[-1:].isspace():
            return False
        last = (
            self._backend.encode(end + word, add_special_tokens=False).ids[-1] for word in ("a", "s", "t", "x", "the")
        )
        return any(self.token_text(token_id)[:1].isspace() for token_id in last)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens and unknown ids are left out; spaces are not cleaned up."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it (`Ġthe`, `▁the`, `<0xE2>`); None for an unknown id."""
        piece = self._backend.id_to_token(token_id)
        return None if piece is None else str(piece)

    def token_text(self, token_id: int) -> str:
        """Return one token for display: its text with spaces; if it is only a part of a character, its spelling."""
        piece = self.piece(token_id)
        if piece is None:
            return f"<{token_id}>"
        # Some decoders drop the space at the start of a text, so decode the token twice and take the second part.
        once, twice = (self._backend.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return piece if REPLACEMENT in twice else str(twice[len(once) :])


class IncrementalDecoder:
    """Streams text from tokens: only text that later tokens cannot change any more.

    The results of all `push` calls, then `flush`, are exactly the text that `decode` of all the tokens adds to the text
    `before` them. A character can span several tokens, and sentencepiece decoders drop the space before the first
    token, although after a prompt that space belongs to the output. So a window of tokens is decoded twice, without and
    with the new tokens; the difference is the new text. This is the prefix-offset method of text-generation-inference
    and vLLM (`detokenize_incrementally`) with one addition: sentencepiece bytes are held until the end of their run,
    because one that is not UTF-8 turns the whole run into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """Start after the tokens `before`, such as a prompt's. Their text is not returned."""
        self._tokenizer = tokenizer
        last = next((token_id for token_id in reversed(before) if self._is_whole(token_id)), None)
        # The tokens of the last returned text: context for the next.
        self._shown: list[int] = [] if last is None else [last]
        self._held: list[int] = []  # the tokens whose text was not returned yet

    def push(self, *token_ids: int) -> str:
        """Append tokens; return the text that became final, often none."""
        pieces = [self._tokenizer.piece(token_id) for token_id in token_ids]
        known = zip(token_ids, pieces, strict=True)
        read = [(t, piece) for t, piece in known if piece is not None and t not in self._tokenizer.special_ids]
        if not read:
            return ""
        before = len(self._held)
        self._held += [token_id for token_id, _ in read]
        text = "" if SENTENCEPIECE_BYTE.fullmatch(read[-1][1]) else self._held_text()
        # A tail of U+FFFD may be the first bytes of a character. An empty text may be a space that shows later.
        if text and not text.endswith(REPLACEMENT):
            self._shown, self._held = self._held, []
            return text
        if len(read) == 1:
            return ""
        del self._held[before:]  # the first of them may be final
        return "".join(self.push(token_id) for token_id, _ in read)

    def _is_whole(self, token_id: int) -> bool:
        """Return whether a token has a text of its own and is not a part of a character."""
        piece = self._tokenizer.piece(token_id)
        if piece is None or token_id in self._tokenizer.special_ids or SENTENCEPIECE_BYTE.fullmatch(piece):
            return False
        return not self._tokenizer.decode([token_id]).endswith(REPLACEMENT)

    def flush(self) -> str:
        """Return the text that was held back; call it after the last token."""
        text = self._held_text()
        self._shown, self._held = self._held, []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: Python's form of command line bytes that are not UTF-8
        raise UserError("the text holds bytes that are not UTF-8") from None


def _load_backend(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """Return the tokenizer, and its begin and end tokens if its own file names them."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path)), {}
        except Exception as error:  # the package raises no narrower type
            raise UserError(f"{folder}: tokenizer.json cannot be read ({one_line(error)})") from None
    if (folder / SENTENCEPIECE).is_file():
        from common.sentencepiece_model import load_sentencepiece

        return load_sentencepiece(folder, tokenizer_config)
    if not any((folder / part).is_file() for part in PARTS):
        wanted = ", ".join((*PARTS, SENTENCEPIECE))
        raise UserError(f"{folder}: no tokenizer; expected tokenizer.json, or one of {wanted}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # damaged files, a missing package, remote code: the messages say what is wrong
        raise UserError(
            f"{folder}: no tokenizer.json, and the tokenizer's other files do not load ({one_line(error)})"
        ) from None
    if not isinstance(backend, Backend):
        raise UserError(f"{folder}: no tokenizer.json, and none can be made of the tokenizer's other files")
    return backend, {}
