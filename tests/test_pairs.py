"""Layouts, filters and counts of the pairs stage, on sources written by each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp2dpo.errors import DataError, RunDirError
from sp2dpo.hashing import sha256_file, sha256_json
from sp2dpo.pairs import MESSAGES, PAIRS_SCHEMA, Prepared, pair_id, prepare, read_pairs, write_prepared
from sp2dpo.settings import DataSettings
from sp2dpo.tables import is_current, read_manifest

DEFAULT = ("duplicate_prompt_id", "empty_field")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def prepared(tmp_path: Path, rows: list[Any], **changes: Any) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(DataSettings(source=path.name, **changes), tmp_path)


def texts(result: Prepared) -> list[Any]:
    return [[row[side] for side in ("prompt", "chosen", "rejected")] for row in result.pairs.to_pylist()]


def h4(prompt: str, chosen: str | None, rejected: str | None, **more: Any) -> dict[str, Any]:
    """A row as in UltraFeedback binarized: text prompt, whole conversations."""
    sides = {"chosen": [user(prompt), reply(chosen)], "rejected": [user(prompt), reply(rejected)]}
    return {"prompt": prompt, "prompt_id": prompt} | sides | more


CANONICAL = [[user("q")], [reply("good")], [reply("bad")]]


# Layouts ------------------------------------------------------------------------------------------------------------


def test_whole_conversations_beside_a_text_prompt_are_split(tmp_path: Path) -> None:
    result = prepared(tmp_path, [h4("q", "good", "bad", score_chosen=8.5)])
    assert result.schema == "trl-explicit"
    assert texts(result) == [CANONICAL]
    assert result.pairs["score_chosen"].to_pylist() == [8.5]


@pytest.mark.parametrize("prompt", ["q", [user("q")]])
@pytest.mark.parametrize("whole", [True, False])
def test_every_explicit_layout_gives_the_same_pair(tmp_path: Path, prompt: Any, whole: bool) -> None:
    head = [user("q")] if whole else []
    row = {"prompt": prompt, "chosen": [*head, reply("good")], "rejected": [*head, reply("bad")]}
    assert texts(prepared(tmp_path, [row])) == [CANONICAL]


def test_plain_strings_become_one_message_each(tmp_path: Path) -> None:
    assert texts(prepared(tmp_path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}])) == [CANONICAL]


def test_argilla_rows_may_hold_text_or_messages(tmp_path: Path) -> None:
    ratings = {"chosen-rating": 5.0, "rejected-rating": 3.0, "source": "evol"}
    as_text = {"prompt": "q", "chosen": "good", "rejected": "bad"} | ratings
    as_list = {"prompt": "q", "chosen": [user("q"), reply("good")], "rejected": [user("q"), reply("bad")]} | ratings
    result = prepared(tmp_path, [as_text, as_list], filters=())
    assert result.schema == "argilla"
    assert texts(result) == [CANONICAL, CANONICAL]
    assert result.pairs.column_names == [*PAIRS_SCHEMA.names, "chosen-rating", "rejected-rating", "source"]


def test_the_sign_of_helpsteer3_picks_the_winner_and_zero_is_a_tie(tmp_path: Path) -> None:
    row = {"context": [user("q")], "response1": "good", "response2": "bad", "domain": "code"}
    swapped = row | {"response1": "bad", "response2": "good", "overall_preference": 3}
    rows = [row | {"overall_preference": -1}, swapped, row | {"overall_preference": 0}]
    result = prepared(tmp_path, rows, filters=())
    assert result.schema == "helpsteer3"
    assert texts(result) == [CANONICAL, CANONICAL]
    assert result.counts == {"raw": 3, "tie": 1, "kept": 2}


def test_hh_transcripts_are_split_into_turns(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant:"
    result = prepared(tmp_path, [{"chosen": f"{start} good", "rejected": f"{start} bad"}])
    assert result.schema == "hh-rlhf"
    assert texts(result) == [[[user("hi"), reply("hello"), user("q")], [reply("good")], [reply("bad")]]]


def test_an_hh_transcript_may_have_its_prompt_in_a_column(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"}
    assert texts(prepared(tmp_path, [row])) == [CANONICAL]


def test_hh_sides_that_part_before_the_last_reply_are_dropped(tmp_path: Path) -> None:
    good = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    longer = good | {"chosen": "\n\nHuman: q\n\nAssistant: a Human: b\n\nAssistant: c"}
    assert prepared(tmp_path, [good, longer]).counts["prompts_differ"] == 1


def test_an_implicit_prompt_is_the_common_message_prefix(tmp_path: Path) -> None:
    row = {"chosen": [user("q"), reply("good")], "rejected": [user("q"), reply("bad")]}
    result = prepared(tmp_path, [row])
    assert result.schema == "trl-implicit"
    assert texts(result) == [CANONICAL]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Say: a b", "Say: a b c", "Say: a"),
    ],
)
def test_an_implicit_text_prompt_ends_at_white_space(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    [[question, good, bad]] = texts(prepared(tmp_path, [{"chosen": chosen, "rejected": rejected}]))
    assert question == [user(prompt)]
    assert prompt + good[0]["content"] == chosen
    assert prompt + bad[0]["content"] == rejected


def test_system_prompts_and_earlier_turns_survive(tmp_path: Path) -> None:
    head = [{"role": "system", "content": "be kind"}, user("hi"), reply("hello"), user("q")]
    whole = {"chosen": [*head, reply("good")], "rejected": [*head, reply("bad")]}
    tail = {"prompt": head, "chosen": [user("q"), reply("good")], "rejected": [user("q"), reply("bad")]}
    for row in (whole, whole | {"prompt": "q"}, whole | {"prompt": head}, tail):
        assert texts(prepared(tmp_path, [row])) == [[head, [reply("good")], [reply("bad")]]]


def test_a_reply_may_go_on_for_several_turns(tmp_path: Path) -> None:
    chosen = [user("q"), reply("good"), user("more"), reply("yes")]
    row = {"chosen": chosen, "rejected": [user("q"), reply("bad"), user("more"), reply("no")]}
    assert texts(prepared(tmp_path, [row]))[0][:2] == [[user("q")], chosen[1:]]


def test_identical_conversations_keep_their_last_message_as_the_reply(tmp_path: Path) -> None:
    same = [user("q"), reply("good")]
    result = prepared(tmp_path, [{"chosen": same, "rejected": same}])
    assert texts(result) == [[[user("q")], [reply("good")], [reply("good")]]]
    assert result.notes["identical_responses"] == 1


def test_sharegpt_keys_and_roles_are_translated_and_other_keys_left_out(tmp_path: Path) -> None:
    ask = {"from": "human", "value": "q", "weight": 1}
    row = {"chosen": [ask, {"from": "gpt", "value": "good"}], "rejected": [ask, {"role": "Model", "content": "bad"}]}
    assert texts(prepared(tmp_path, [row])) == [CANONICAL]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("q"), reply("good")], [user("p"), reply("bad")]),
        ([reply("good")], [reply("bad")]),
        ([user("q"), reply("a"), reply("b")], [user("q"), reply("a"), reply("c")]),
        ([user("q")], [user("q"), reply("bad")]),
        ([{"role": "system", "content": "s"}, reply("good")], [{"role": "system", "content": "s"}, reply("bad")]),
    ],
)
def test_sides_that_answer_no_common_question_are_dropped(tmp_path: Path, chosen: Any, rejected: Any) -> None:
    rows = [{"chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("b")]}]
    result = prepared(tmp_path, [*rows, {"chosen": chosen, "rejected": rejected}])
    assert result.counts["prompts_differ"] == 1


# Hostile and damaged values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"category": "Safety"}', '[{"role": "user", "content": "x"}]', "a\n\nHuman: b"])
def test_text_that_looks_like_structure_stays_text(tmp_path: Path, text: str) -> None:
    as_text = {"prompt": text, "chosen": text + "1", "rejected": text + "2"}
    [pair] = texts(prepared(tmp_path, [as_text]))
    assert pair == [[user(text)], [reply(text + "1")], [reply(text + "2")]]
    as_list = {"chosen": [user(text), reply(text)], "rejected": [user(text), reply("\n\nAssistant: x")]}
    assert texts(prepared(tmp_path, [as_list])) == [[[user(text)], [reply(text)], [reply("\n\nAssistant: x")]]]


@pytest.mark.parametrize("value", [3, {"a": 1}, ["text"], [[]], [{"role": "narrator", "content": "x"}], "\ud800", True])
def test_values_of_the_wrong_kind_are_unreadable(tmp_path: Path, value: Any) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    result = prepared(tmp_path, [row, row | {"chosen": value}])
    assert result.counts == {"raw": 2, "unreadable": 1, "duplicate_prompt_id": 0, "empty_field": 0, "kept": 1}


def test_half_a_surrogate_in_another_column_is_spelled_out(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "note": "x\ud800", "prompt_id": "\udfff"}
    result = prepared(tmp_path, [row, row | {"prompt_id": "1"}])
    assert result.pairs["note"].to_pylist() == ["x\\ud800"]
    assert result.dropped.to_pylist()[0]["prompt_id"] == "\\udfff"


# Filters and counts -------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_ultrafeedback_in_miniature(tmp_path: Path) -> None:
    sound = [h4(f"q{i}", "good", "bad") for i in range(5)]
    again = [h4("q0", "good", "worse"), h4("q1", "good", "bad")]
    blank = [h4("e1", "", "bad"), h4("e2", "good", " \n"), h4("e3", "good", None), h4("e4", "", "")]
    result = prepared(tmp_path, [*sound, *again, *blank])
    assert result.counts == {"raw": 11, "duplicate_prompt_id": 2, "empty_field": 4, "kept": 5}
    assert list(result.counts) == ["raw", *DEFAULT, "kept"]
    assert result.dropped["source_row"].to_pylist() == [5, 6, 7, 8, 9, 10]


def test_the_first_of_two_duplicates_stays(tmp_path: Path) -> None:
    result = prepared(tmp_path, [h4("q", "first", "bad"), h4("q", "second", "bad")])
    assert texts(result) == [[[user("q")], [reply("first")], [reply("bad")]]]


def test_a_row_that_is_no_pair_does_not_make_the_next_one_a_duplicate(tmp_path: Path) -> None:
    result = prepared(tmp_path, [h4("q", "good", "bad") | {"chosen": 3}, h4("q", "good", "bad")])
    assert result.counts == {"raw": 2, "unreadable": 1, "duplicate_prompt_id": 0, "empty_field": 0, "kept": 1}


def test_a_row_is_dropped_for_the_first_reason_in_the_order_of_the_filters(tmp_path: Path) -> None:
    rows = [h4("q", "good", "bad"), h4("q", "", "bad")]
    assert prepared(tmp_path, rows).dropped["reason"].to_pylist() == ["duplicate_prompt_id"]
    assert prepared(tmp_path, rows, filters=DEFAULT[::-1]).dropped["reason"].to_pylist() == ["empty_field"]


@pytest.mark.parametrize("blank", [None, "", "  ", []])
def test_a_blank_side_is_an_empty_field_in_every_layout(tmp_path: Path, blank: Any) -> None:
    whole = h4("q", "good", "bad")
    rows = [whole, whole | {"chosen": blank, "prompt_id": "2"}, whole | {"rejected": blank, "prompt_id": "3"}]
    plain = {"prompt": blank, "chosen": "good", "rejected": "bad"}
    result = prepared(tmp_path, [*rows, plain])
    assert result.counts == {"raw": 4, "duplicate_prompt_id": 0, "empty_field": 3, "kept": 1}


def test_without_ids_a_pair_is_its_own_id(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    result = prepared(tmp_path, [row, row, row | {"rejected": "worse"}])
    assert result.counts == {"raw": 3, "duplicate_prompt_id": 1, "empty_field": 0, "kept": 2}
    assert result.pairs["prompt_id"].to_pylist() == result.pairs["pair_id"].to_pylist()


def test_oddities_are_counted_unless_named_as_filters(tmp_path: Path) -> None:
    rows = [
        h4("a", "same", "same", score_chosen=5, score_rejected=5),
        h4("b", "good", "bad", score_chosen=4, score_rejected=6.5),
        h4("b", "good", "bad", score_chosen=None, score_rejected=1) | {"prompt_id": "c"},
    ]
    odd = ("identical_responses", "equal_scores", "reversed_scores", "duplicate_pair")
    assert prepared(tmp_path, rows).notes == dict.fromkeys(odd, 1)
    named = prepared(tmp_path, [*rows, h4("d", "good", "bad")], filters=odd)
    assert named.counts == {"raw": 4} | dict(zip(odd, (1, 0, 1, 1), strict=True)) | {"kept": 1}
    assert named.notes == dict.fromkeys(DEFAULT, 0)


def test_a_misspelt_filter_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'empty_fields' is no filter .did you mean 'empty_field'"):
        prepared(tmp_path, [h4("q", "good", "bad")], filters=("empty_fields",))


def test_no_usable_row_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raw 1, duplicate_prompt_id 0, empty_field 1, kept 0"):
        prepared(tmp_path, [h4("q", "", "bad")])


CELL = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.fixed_dictionaries({"role": st.just("user")}))
SIDE = CELL | st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "x"]), "content": st.sampled_from(["", "a", "b", None, 1])}
    )
)
ROW = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "prompt_id", "other"]), SIDE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(rows=st.lists(ROW, max_size=6))
def test_every_row_is_counted_once(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    result = prepared(tmp_path, [h4("sound", "good", "bad"), *rows])
    assert result.counts["raw"] == len(rows) + 1 == result.pairs.num_rows + result.dropped.num_rows
    assert sum(result.counts.values()) == 2 * result.counts["raw"]
    seen = result.pairs["source_row"].to_pylist() + result.dropped["source_row"].to_pylist()
    assert set(seen) == set(range(len(rows) + 1))


# Columns ------------------------------------------------------------------------------------------------------------


def test_the_users_column_names_are_translated(tmp_path: Path) -> None:
    row = {"question": "q", "better": "good", "rejected": "bad", "prompt": "old"}
    result = prepared(tmp_path, [row], columns={"prompt": "question", "chosen": "better"})
    assert texts(result) == [CANONICAL]
    assert result.pairs["source_prompt"].to_pylist() == ["old"]


def test_chosen_and_rejected_can_be_exchanged(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "bad", "rejected": "good"}
    assert texts(prepared(tmp_path, [row], columns={"chosen": "rejected", "rejected": "chosen"})) == [CANONICAL]


@pytest.mark.parametrize("columns", [{"prompts": "prompt"}, {"prompt": "promt"}])
def test_a_misspelt_column_is_named_with_the_nearest(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(DataError, match="did you mean 'prompt'"):
        prepared(tmp_path, [h4("q", "good", "bad")], columns=columns)


def test_a_source_of_no_known_layout_lists_its_columns_and_what_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instruction, output.*trl-explicit: prompt, chosen, rejected"):
        prepared(tmp_path, [{"instruction": "q", "output": "a"}])


def test_other_columns_keep_numbers_and_texts_and_spell_the_rest_as_json(tmp_path: Path) -> None:
    more = {"n": 1, "flag": True, "tags": ["a", "ö"], "mixed": "x", "huge": 2**70, "none": None, "pair_id": "p"}
    second = h4("r", "good", "bad") | more | {"n": None, "mixed": 2}
    result = prepared(tmp_path, [h4("q", "good", "bad") | more, second]).pairs
    assert result.column_names[:6] == PAIRS_SCHEMA.names
    assert result["n"].to_pylist() == [1, None]
    assert result["flag"].to_pylist() == [True, True]
    assert result["tags"].to_pylist()[0] == '["a", "ö"]'
    assert result["mixed"].to_pylist() == ['"x"', "2"]
    assert result["huge"].to_pylist()[0] == str(2**70)
    assert result["source_pair_id"].to_pylist() == ["p", "p"]
    assert result["none"].type == pa.string()


def test_a_pair_id_is_the_hash_of_its_messages(tmp_path: Path) -> None:
    [identity] = prepared(tmp_path, [h4("q", "good", "bad")]).pairs["pair_id"].to_pylist()
    assert identity == pair_id(*CANONICAL) == sha256_json(CANONICAL)


# On disk ------------------------------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_bytes_and_a_manifest(tmp_path: Path) -> None:
    rows = [h4("q", "good", "bad", score=1.5), h4("e", "", "bad", score=2)]
    paths = [tmp_path / "a" / "pairs.parquet", tmp_path / "b" / "pairs.parquet"]
    for path in paths:
        write_prepared(prepared(tmp_path, rows), path, inputs={"source": "s"}, lambda_hash="l")
    assert sha256_file(paths[0]) == sha256_file(paths[1])
    assert paths[0].with_name("pairs.dropped.csv").read_text(encoding="utf-8").count("empty_field") == 1
    manifest = read_manifest(paths[0])
    assert manifest is not None
    assert (manifest["counts"]["kept"], manifest["schema"]) == (1, "trl-explicit")
    assert is_current(paths[0], inputs={"source": "s"}, lambda_hash="l")


def test_pairs_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    result = prepared(tmp_path, [h4("q", "good", "bad", score=1.5)])
    write_prepared(result, tmp_path / "pairs.parquet", inputs={}, lambda_hash="l")
    assert read_pairs(tmp_path / "pairs.parquet", "sp2dpo prepare").equals(result.pairs)


def test_a_table_made_by_hand_is_taken_if_its_types_can_be_cast(tmp_path: Path) -> None:
    text = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    sides: dict[str, Any] = {
        side: pa.array([turns], text) for side, turns in zip(PAIRS_SCHEMA.names[2:5], CANONICAL, strict=True)
    }
    pq.write_table(pa.table(sides | {"pair_id": ["p"], "prompt_id": ["p"]}), tmp_path / "hand.parquet")
    table = read_pairs(tmp_path / "hand.parquet", "sp2dpo prepare")
    assert table.schema.field("chosen").type == MESSAGES
    assert table["prompt"].to_pylist() == [CANONICAL[0]]


def test_a_pairs_table_with_missing_or_wrong_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    with pytest.raises(RunDirError, match="make it with: sp2dpo prepare"):
        read_pairs(path, "sp2dpo prepare")
    pq.write_table(pa.table({"pair_id": ["p"], "prompt": ["q"]}), path)
    with pytest.raises(DataError, match="no column prompt_id, chosen, rejected"):
        read_pairs(path, "sp2dpo prepare")
    pq.write_table(pa.table({name: ["x"] for name in PAIRS_SCHEMA.names}), path)
    with pytest.raises(DataError, match="column prompt is string"):
        read_pairs(path, "sp2dpo prepare")
