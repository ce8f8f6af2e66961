"""Tokenizers of three kinds: ids and text equal the libraries', and streamed text adds up to decode's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import common.tokenizer
from common.errors import UserError
from common.tokenizer import IncrementalDecoder, Tokenizer

ROOT = Path(common.tokenizer.__file__).parents[1]
TEXT = "the time the machine keeps: naïve café, 東京 and 😀😀 👩‍🚀, the end.\n\n    the  spaces   stay\n"


def byte_level() -> Backend:
    """Make one of GPT-2's kind: every byte is a token, so characters can be split anywhere. 😀 is partly merged."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    return backend


def sentencepiece(decoder: decoders.Decoder) -> Backend:
    """Make one of Llama 2's kind: a space is ▁, one is put before the text, unknown characters become byte tokens."""
    words = ["▁the", "▁end", "▁time", "▁machine", "▁", "the", "e", "n", "d", ",", ".", "▁▁", "�"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def llama() -> Backend:
    strip = decoders.Strip(content=" ", left=1)
    return sentencepiece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    )


def metaspace() -> Backend:
    return sentencepiece(decoders.Metaspace())


MAKES = {make.__name__: Tokenizer(make(), None, ()) for make in (byte_level, llama, metaspace)}
makes = pytest.mark.parametrize("tokenizer", MAKES.values(), ids=MAKES.keys())


def save(backend: Backend, folder: Path, **tokenizer_config: Any) -> None:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def streamed(tokenizer: Tokenizer, ids: list[int], before: list[int] | None = None) -> list[str]:
    """Return the results of every push, and last of the flush."""
    decoder = IncrementalDecoder(tokenizer, before or [])
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@makes
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streamed_text_adds_up_to_decode_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Ids past the vocabulary, too: a model's logits may be wider than its tokenizer.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=20))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@makes
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_several_tokens_at_once_give_the_text_of_single_ones(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), min_size=1, max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=5)) | {len(ids)})
    single, several = (IncrementalDecoder(tokenizer, ids[:2]) for _ in range(2))
    begin = 0
    for end in cuts:
        assert several.push(*ids[begin:end]) == "".join(map(single.push, ids[begin:end]))
        begin = end
    assert several.flush() == single.flush()


@makes
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12) | st.text(alphabet="the 😀é\n", max_size=30))
def test_streamed_text_of_valid_utf8_never_shows_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    chunks = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(chunks) == tokenizer.decode(tokenizer.encode(text))
    assert "\ufffd" in text or not any("\ufffd" in chunk for chunk in chunks)


def test_an_emoji_of_several_tokens_comes_at_once_when_it_is_complete() -> None:
    tokenizer = MAKES["byte_level"]
    ids = tokenizer.encode("🎉")
    assert len(ids) == 3
    assert streamed(tokenizer, [*ids, *tokenizer.encode("!")]) == ["", "", "🎉", "!", ""]
    assert streamed(tokenizer, ids[:2]) == ["", "", "\ufffd"], "what never became a character comes with the flush"


@pytest.mark.parametrize("make", ["llama", "metaspace"])
def test_words_stream_one_by_one_with_their_spaces(make: str) -> None:
    tokenizer = MAKES[make]
    assert streamed(tokenizer, tokenizer.encode("the end, the time")) == ["", "the", " end", ",", " the", " time", ""]


@makes
@given(data=st.data())
def test_streamed_text_is_what_follows_the_prompt(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from(["the time", "the end. ", "the 😀", "the", "café"]))
    before = tokenizer.encode(prompt)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=12))
    whole = tokenizer.decode(before + ids)
    if whole.startswith(tokenizer.decode(before)):  # bytes of both may be one run, or one character
        assert "".join(streamed(tokenizer, ids, before)) == whole[len(tokenizer.decode(before)) :]


@pytest.mark.parametrize("make", ["llama", "metaspace"])
@pytest.mark.parametrize("prompt", ["the machine", "the 😀", "the "])
def test_the_first_space_of_an_output_is_kept(make: str, prompt: str) -> None:
    tokenizer = MAKES[make]
    the, end = (tokenizer._backend.get_vocab()[piece] for piece in ("▁the", "▁end"))
    assert streamed(tokenizer, [the, end], tokenizer.encode(prompt)) == [" the", " end", ""]
    assert streamed(tokenizer, [the, end]) == ["the", " end", ""]
    assert streamed(tokenizer, [the, end], [1]) == ["the", " end", ""]  # after a begin token alone


def test_sentencepiece_bytes_wait_for_the_end_of_their_run() -> None:
    tokenizer = MAKES["llama"]
    a, broken, end = 3 + ord("a"), 3 + 0xFF, tokenizer.encode(".")[-1]
    assert streamed(tokenizer, [a, end]) == ["", "a.", ""]
    assert streamed(tokenizer, [a, broken, end]) == ["", "", "\ufffd\ufffd.", ""]  # the a is lost too, as in decode


@pytest.mark.parametrize("make", ["byte_level", "llama"])
def test_text_survives_encode_and_decode(make: str) -> None:
    assert MAKES[make].decode(MAKES[make].encode(TEXT)) == TEXT


def test_special_tokens_are_known_and_not_decoded() -> None:
    byte_level, llama = MAKES["byte_level"], MAKES["llama"]
    assert (set(byte_level.special_ids), set(llama.special_ids)) == ({0}, {0, 1, 2})
    assert llama.encode("the")[0] == 1, "the post-processor's begin token"
    tool_call = byte_level.vocab_size - 1  # an added token that is not special, after the trained ones
    assert byte_level.encode("<tool call><|end|>") == [tool_call, 0]
    assert byte_level.decode([0, tool_call, 0]) == "<tool call>"


def test_token_text_for_display() -> None:
    byte_level, llama = MAKES["byte_level"], MAKES["llama"]
    the = llama.encode("the")[-1]
    assert llama.token_text(the) == " the"
    assert byte_level.token_text(byte_level.encode(" the")[0]) in (" the", " th", " t")
    assert byte_level.token_text(0) == "<|end|>"
    assert llama.token_text(3 + 0xF0) == "<0xF0>", "a part of a character"
    assert llama.token_text(10**6) == "<1000000>"


def test_the_same_ids_and_text_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, make in enumerate((byte_level, llama)):
        folder = tmp_path / str(number)
        backend = make()
        backend.enable_truncation(5)  # as in files saved after training; transformers does not apply it either
        backend.enable_padding(length=50, pad_id=0, pad_token=backend.id_to_token(0))
        save(backend, folder, tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
        theirs = AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer.load(folder, {}, {})
        ids = ours.encode(TEXT)
        assert ids == theirs(TEXT)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.vocab_size == len(theirs)


def test_a_tokenizer_in_parts_is_built_by_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    byte_level().model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    ours = Tokenizer.load(tmp_path, {"eos_token_id": 0}, {})
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert ours.decode(ours.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("generation_config", "config", "tokenizer_config", "expected"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 5}, {"eos_token": "</s>"}, (2, 7)),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, {}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token": "</s>"}, (5,)),
        ({}, {}, {"eos_token": "</s>"}, (2,)),
        ({}, {"eos_token_id": []}, {"eos_token": {"content": "</s>", "special": True}}, (2,)),
        ({}, {}, {"eos_token": "no such token"}, ()),
        ({}, {}, {}, ()),
    ],
)
def test_where_the_end_tokens_come_from(
    tmp_path: Path,
    generation_config: dict[str, Any],
    config: dict[str, Any],
    tokenizer_config: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    save(llama(), tmp_path, **tokenizer_config)
    assert Tokenizer.load(tmp_path, config, generation_config).eos_ids == expected


def test_the_begin_token(tmp_path: Path) -> None:
    save(llama(), tmp_path, bos_token="<s>")
    assert Tokenizer.load(tmp_path, {}, {}).bos_id == 1
    assert Tokenizer.load(tmp_path, {"bos_token_id": 0}, {}).bos_id == 0
    save(llama(), tmp_path)
    assert Tokenizer.load(tmp_path, {}, {}).bos_id is None


def test_null_is_no_token(tmp_path: Path) -> None:
    """GPT-2's vocabulary has a token `None`."""
    backend = llama()
    backend.add_tokens(["None"])
    for tokenizer_config in ({"model_max_length": 1024}, {"bos_token": None, "eos_token": {"content": None}}):
        save(backend, tmp_path, **tokenizer_config)
        tokenizer = Tokenizer.load(tmp_path, {}, {})
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())


def test_a_begin_token_by_flag_where_the_template_is_silent(tmp_path: Path) -> None:
    silent = byte_level()
    plain = Tokenizer(silent, None, ()).encode(TEXT)
    flag = {"add_bos_token": True, "bos_token": {"content": "<|end|>"}}
    save(silent, tmp_path, **flag)
    tokenizer = Tokenizer.load(tmp_path, {}, {})
    assert tokenizer.encode(TEXT) == [0, *plain]
    assert tokenizer.encode_batch([TEXT, ""]) == [[0, *plain], [0]]
    assert tokenizer.encode(TEXT, special=False) == plain
    save(silent, tmp_path, **{**flag, "add_bos_token": False})
    assert Tokenizer.load(tmp_path, {}, {}).encode(TEXT) == plain
    save(llama(), tmp_path, add_bos_token=True, bos_token="<s>")
    assert Tokenizer.load(tmp_path, {}, {}).encode("the").count(1) == 1  # the template has put it there


def damage_json(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


def empty_object(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


def damaged_parts(folder: Path) -> None:
    remove(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "vocab.json").write_text("{")
    (folder / "merges.txt").write_text("a b")


@pytest.mark.parametrize("damage", [damage_json, empty_object, remove, damage_config, damaged_parts])
def test_missing_and_damaged_files_name_the_folder(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(llama(), tmp_path / "here")
    damage(tmp_path / "here")
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path / "here", {}, {})
    assert str(tmp_path / "here") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_end_token_names_the_folder(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    with pytest.raises(UserError, match="eos_token_id should be a token id or a list, got 'two'"):
        Tokenizer.load(tmp_path, {}, {"eos_token_id": "two"})


@pytest.mark.parametrize("wrong", [-1, 2**31, 10**30, True, 1.5, [1, "2"], [None], [[1]], {"a": 1}])
def test_ids_that_no_token_can_have(tmp_path: Path, wrong: Any) -> None:
    save(llama(), tmp_path)
    for generation_config, config in (({"eos_token_id": wrong}, {}), ({}, {"bos_token_id": wrong})):
        with pytest.raises(UserError, match="_token_id should be a token id or a list, got "):
            Tokenizer.load(tmp_path, config, generation_config)


def test_a_template_with_a_token_that_the_model_lacks(tmp_path: Path) -> None:
    backend = llama()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2**32 - 1)])
    save(backend, tmp_path)
    tokenizer = Tokenizer.load(tmp_path, {}, {})
    tokenizer.refuse_from(300, "the/model")
    with pytest.raises(UserError, match=r"the/model: the text holds token 4294967295 \(None\)"):
        tokenizer.encode("the")


def test_a_text_for_which_there_are_no_tokens(tmp_path: Path) -> None:
    """Without an unknown token the library raises an error of no particular type."""
    backend = Backend(models.Unigram([("a", -1.0)], unk_id=None))
    save(backend, tmp_path)
    tokenizer = Tokenizer.load(tmp_path, {}, {})
    tokenizer.refuse_from(300, "the/model")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match="the/model: the tokenizer cannot encode the text"):
        tokenizer.encode("b")
    with pytest.raises(UserError, match="the/model: the tokenizer cannot encode the text"):
        tokenizer.encode_batch(["a", "b"])


def test_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        MAKES["byte_level"].encode("caf\udce9")


def test_the_embedded_tokenizer_loads_without_transformers(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "common" / "models" / "stdlib-10m", tmp_path / "stdlib-10m")
    code = (
        "import sys; from pathlib import Path; from common.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(Path(sys.argv[1]), {}, {})\n"
        "print(tokenizer.decode(tokenizer.encode('import re')), tokenizer.vocab_size, tokenizer.eos_ids)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["import re 4096 (0,)", "[]"]


@makes
def test_white_space_that_joins_the_next_word_is_told(tokenizer: Tokenizer) -> None:
    assert [
        text for text in ("the ", "the  ", "\n    the ", "the\n", "the,", "the", "") if tokenizer.joins_next(text)
    ] == [
        "the ",
        "the  ",
        "\n    the ",
    ]
