"""Tokenizers, and tokens in rows."""

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from experiments.lm.tokens import START, Tokens, make
from experiments.lm.windows import overlapping, packed, paired

TEXT = "It cost £5 – naïve, isn't it?\n\nSaid Emma: it cost £5.\r\n漢字" * 20
KINDS = ("characters", "bytes", "bpe")


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make(kind, [TEXT], TEXT, 280) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_changes_nothing(tokenizers, kind, tmp_path):
    tokens = tokenizers[kind]
    encoded = tokens.encode(TEXT)
    assert encoded.dtype == np.int32
    assert tokens.decode(encoded) == TEXT
    assert tokens.lengths(encoded).sum() == len(TEXT.encode())
    assert tokens.lengths(np.array([tokens.start])) == 0
    tokens.write(tmp_path / "tokenizer.json")
    again = Tokens.read(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(TEXT), encoded)
    assert (again.bytes, again.start, again.size) == (
        tokens.bytes,
        tokens.start,
        tokens.size,
    )


def test_tokens_stand_for_what_their_kind_says(tokenizers):
    sizes = {kind: len(each.encode(TEXT)) for kind, each in tokenizers.items()}
    assert sizes["characters"] == len(TEXT)
    assert sizes["bytes"] == len(TEXT.encode())
    assert sizes["bpe"] < 0.7 * len(TEXT)
    assert tokenizers["characters"].size == len(set(TEXT)) + 1
    assert tokenizers["bytes"].size == 257
    assert tokenizers["bpe"].size == 280
    assert [tokenizers[kind].has_pairs for kind in KINDS] == [False, False, True]


def test_text_like_a_special_token_is_text(tokenizers):
    for kind in ("bytes", "bpe"):
        encoded = tokenizers[kind].encode(f"a {START} b")
        assert tokenizers[kind].start not in encoded
        assert tokenizers[kind].decode(encoded) == f"a {START} b"


def test_unknown_characters_are_refused_by_name(tokenizers):
    with pytest.raises(ValueError, match="'Z', '€'"):
        tokenizers["characters"].encode("Zoe cost €5")
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode("Zoe €5")) == "Zoe €5"


def of_others():
    """A tokenizer like Qwen's, whose tokens may go over the ends of lines."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s+")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), by_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["\n\n \n\n" * 9, "the end.\n\nThe end" * 9], trainer)
    tokenizer.add_special_tokens([START])
    return tokenizer


def test_tokens_of_others_go_over_the_ends_of_lines():
    text = "the end.\n\nThe \n\nend"
    expected = of_others().encode(text).tokens
    assert ".ĊĊ" in expected
    assert "ĠĊĊ" in expected
    tokenizer = of_others()
    encoded = Tokens(tokenizer).encode(text)
    assert [tokenizer.id_to_token(token) for token in encoded] == expected


def test_tokens_made_here_end_where_lines_do(tokenizers):
    tokens = make("bpe", ["a  \n\nb  \n\n" * 20], "", 280)
    lines = ["a  \n", "\n", "b  \n", "\n"]
    assert max(each.count(b"\n") for each in tokens.bytes) == 1
    np.testing.assert_array_equal(
        tokens.encode("".join(lines)), np.concatenate([*map(tokens.encode, lines)])
    )


def test_a_file_that_pads_or_cuts_changes_nothing():
    expected = Tokens(of_others()).encode("the end")
    padding = of_others()
    padding.enable_padding(length=50, pad_id=padding.token_to_id(START))
    cutting = of_others()
    cutting.enable_truncation(1)
    for tokenizer in (padding, cutting):
        np.testing.assert_array_equal(Tokens(tokenizer).encode("the end"), expected)


def test_a_model_may_have_more_tokens_than_its_tokenizer(tokenizers):
    tokens = tokenizers["bytes"]
    ids = [*tokens.encode("a"), tokens.size, tokens.size + 100, *tokens.encode("b")]
    assert tokens.decode(ids) == "ab"


def test_added_tokens_are_text_unless_they_are_special():
    tokenizer = of_others()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokens = Tokens(tokenizer)
    encoded = tokens.encode(f"so <think>{START}")
    assert tokenizer.token_to_id("<think>") in encoded
    assert tokens.start not in encoded


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_place():
    composing = of_others()
    composing.normalizer = normalizers.NFC()
    told = r"'e\\u0301' at character 3, of which this tokenizer makes '\\xe9'; expected"
    with pytest.raises(ValueError, match=told):
        Tokens(composing).encode("cafe\u0301")
    lower = of_others()
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"'The end' at character 5, .* 'the end'"):
        Tokens(lower).encode("end. The end")


def test_files_that_hold_no_tokenizer_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokens.read(path)


def numbered(*lengths):
    """Texts whose tokens are all different."""
    ends = np.cumsum(lengths)
    return [
        np.arange(end - n, end, dtype=np.int32)
        for end, n in zip(ends, lengths, strict=True)
    ]


START_TOKEN = 999


def test_packed_rows_predict_every_token_once():
    texts = numbered(5, 20, 14)  # 42 tokens with three starts: 1 + 41 of stride 7 + 1
    rows = packed(texts, START_TOKEN, 8)
    tokens, segments = rows["tokens"], rows["segments"]
    assert tokens.shape == segments.shape == (6, 8)
    predicted = tokens[:, 1:][segments[:, 1:] == segments[:, :-1]]
    assert set(predicted) == set(range(39))
    firsts = tokens[:, 1:][segments[:, 1:] != segments[:, :-1]]
    assert set(firsts) == {START_TOKEN}
    assert sorted(predicted[:-7]) == sorted(
        set(predicted[:-7])
    )  # the last reaches back
    for number, text in enumerate(texts, start=1):
        assert set(segments[np.isin(tokens, text)]) == {number}


@pytest.mark.parametrize("lengths", [[1], [7], [8], [9], [500], [30, 1, 7, 8, 64]])
def test_held_out_tokens_are_scored_once_with_what_is_before_them(lengths):
    texts = numbered(*lengths)
    rows = overlapping(texts, START_TOKEN, 8)
    tokens, scored = rows["tokens"], rows["scored"]
    np.testing.assert_array_equal(tokens[scored], np.concatenate(texts))
    assert not scored[:, 0].any()
    # A quarter of a row before all but the first tokens of a text.
    first = scored.argmax(1)
    begins = tokens[:, 0] == START_TOKEN
    assert (first[~begins] >= 2).all()
    assert (rows["segments"][scored] == 1).all()


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match=r"--context: got 8 for a text of 6 tokens"):
        packed(numbered(5), START_TOKEN, 8)


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_paired_rows_read_the_same_text(tokenizers, kind):
    own, teacher = tokenizers["bpe"], tokenizers[kind]
    rows = paired([TEXT[:301], TEXT[301:]], own, teacher, 64)
    assert rows["aligned"].mean() > 0.8
    for i, (tokens, others) in enumerate(
        zip(rows["tokens"], rows["teacher_tokens"], strict=True)
    ):
        for t, place in enumerate(rows["read"][i]):
            ours = b"".join(own.bytes[token] or b"|" for token in tokens[: t + 1])
            theirs = b"".join(
                teacher.bytes[token] or b"|" for token in others[: place + 1]
            )
            if rows["aligned"][i, t]:
                # A row may begin within a character, which the teacher has whole.
                assert theirs.endswith(ours)
                assert len(theirs) - len(ours) < 4
                segment = rows["teacher_segments"][i, place]
                assert segment == rows["segments"][i, t]
