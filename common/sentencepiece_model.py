"""A SentencePiece model, `tokenizer.model`, as a tokenizer of the `tokenizers` package.

Folders of Llama 2, Mistral and similar models have this file if they have no tokenizer.json. Every setting of the model
that changes a text's ids is converted, or refused, so ids and texts equal those of the sentencepiece library.
(transformers converts too; without a tokenizer_config.json it omits the begin token and the space before a text.)

    backend, names = load_sentencepiece(folder, tokenizer_config)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from common.errors import UserError
from common.files import one_line, read_checked, shown, wrong_value

FILE = "tokenizer.model"
SPACE = "\u2581"  # a space in pieces: ▁
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models


class Added(BaseModel):
    """A token of `added_tokens_decoder`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    content: Annotated[str, Field(min_length=1)]
    special: bool = True


TokenId = Annotated[int, Field(ge=0, lt=2**24)]
DECODER = TypeAdapter(dict[TokenId, Added])  # of tokenizer_config.json; in JSON its ids are strings
ADDED_FILE = TypeAdapter(dict[str, TokenId])  # of added_tokens.json


def load_sentencepiece(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """Return the tokenizer, and the model's begin and end tokens (`bos_token`, `eos_token`), if it has any.

    As in transformers' Llama, a text begins with `bos` unless add_bos_token is false, and ends with `eos` if
    add_eos_token is true. UserError, naming the file, for a damaged model or one that cannot be converted.
    """
    path = folder / FILE
    proto = _read(path)
    pieces = [piece.piece for piece in proto.pieces]
    added = _added_tokens(folder, tokenizer_config)
    for number, token in added.items():
        if number < len(pieces):  # a placeholder with a name
            pieces[number] = token.content
    if len(set(pieces)) < len(pieces):
        raise UserError(f"{path}: two of its pieces are the same; download or copy it again")
    try:
        backend = Backend(_model(proto, pieces, path))
        backend.normalizer = _normalizer(proto.normalizer_spec)
        backend.decoder = _decoder(proto.normalizer_spec)
        _add(backend, proto, pieces, added, path)
        names = _ends(proto, pieces)
        backend.post_processor = _template(names | _renamed(tokenizer_config, backend), tokenizer_config, backend)
    except UserError:
        raise
    except Exception as error:  # the package raises no narrower type
        raise UserError(f"{path}: cannot be converted ({one_line(error)})") from None
    return backend, names


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # created at import
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model, or damaged ({one_line(error)})") from None
    if not proto.pieces:
        raise UserError(f"{path}: not a SentencePiece model; a folder with another kind needs a tokenizer.json")
    return proto


def _model(proto: Any, pieces: list[str], path: Path) -> models.Model:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UserError(f"{path}: spaces are not written before words as {SPACE}, which is not supported")
    if not 0 <= trainer.unk_id < len(pieces):
        raise UserError(f"{path}: the unknown token's id is {trainer.unk_id}, and there are {len(pieces)} pieces")
    if trainer.model_type == UNIGRAM:
        scored = [(name, piece.score) for name, piece in zip(pieces, proto.pieces, strict=True)]
        return models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != BPE:
        raise UserError(f"{path}: models of words or of characters are not supported; supported are BPE and unigram")
    return models.BPE(
        {name: number for number, name in enumerate(pieces)},
        _merges(proto, pieces),
        unk_token=pieces[trainer.unk_id],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(proto: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """List all pairs of pieces whose concatenation is a piece; those of the best piece first."""
    normal = {name: number for number, name in enumerate(pieces) if proto.pieces[number].type in (NORMAL, USER_DEFINED)}
    found = []
    for name, number in normal.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in normal and right in normal:
                found.append((-proto.pieces[number].score, normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _added_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> dict[int, Added]:
    """Return, by id, the tokens that tokenizer_config.json or added_tokens.json adds to or changes in the model's."""
    file = folder / "added_tokens.json"
    found = {}
    if file.is_file():
        found = {number: Added(content=name) for name, number in read_checked(file, ADDED_FILE).items() if name}
    try:
        more = DECODER.validate_python(tokenizer_config.get("added_tokens_decoder") or {})
    except ValidationError as error:
        raise UserError(wrong_value(error, f"{folder / 'tokenizer_config.json'}, added_tokens_decoder")) from None
    return dict(sorted((found | more).items()))


def _add(backend: Backend, proto: Any, pieces: list[str], added: dict[int, Added], path: Path) -> None:
    """Add the tokens that are matched before all others: the model's user-defined ones, and the added ones."""
    for name, piece in zip(pieces, proto.pieces, strict=True):
        if piece.type in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            backend.add_tokens([AddedToken(name, normalized=False, special=False)])
    for number, token in added.items():
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([AddedToken(token.content, normalized=False, special=token.special)])
        if (got := backend.token_to_id(token.content)) != number:
            raise UserError(
                f"{path}: the added token {shown(token.content)} should have the id {number}, and the next that is "
                f"free is {got}; make a tokenizer.json of it"
            )


def _ends(proto: Any, pieces: list[str]) -> dict[str, str]:
    ids = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}
    return {kind: pieces[number] for kind, number in ids.items() if 0 <= number < len(pieces)}


def _renamed(tokenizer_config: dict[str, Any], backend: Backend) -> dict[str, str]:
    """Return begin and end tokens that tokenizer_config.json names instead of the model's."""
    found = {}
    for kind in ("bos_token", "eos_token"):
        token = tokenizer_config.get(kind)
        spelled = token.get("content") if isinstance(token, dict) else token
        if isinstance(spelled, str) and backend.token_to_id(spelled) is not None:
            found[kind] = spelled
    return found


def _template(
    names: dict[str, str], tokenizer_config: dict[str, Any], backend: Backend
) -> processors.PostProcessor | None:
    """Return the template of tokens before and after every text."""
    around = {"bos_token": tokenizer_config.get("add_bos_token"), "eos_token": tokenizer_config.get("add_eos_token")}
    wanted = {"bos_token": around["bos_token"] is not False, "eos_token": around["eos_token"] is True}
    found = {kind: names[kind] for kind, put in wanted.items() if put and kind in names}
    if not found:
        return None
    bos, eos = ([found[kind]] if kind in found else [] for kind in ("bos_token", "eos_token"))
    ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys([*bos, *eos])]
    return processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
