"""Laws of the text data: what goes in comes out, cut as promised, and what cannot be read is refused in words."""

import gzip
import json
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ebt_transformers.assets import shakespeare_path
from ebt_transformers.training import data, run_clm
from ebt_transformers.training.splits import SPLITS, choose_splits


TEXTS = ["To be, or not to be", "that", "is the question:", "", "Whether 'tis nobler in the mind to suffer"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and one for the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: number + 1 for number, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def table(texts: list[str] = TEXTS) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


def joined(rows: data.Tokens) -> list[int]:
    return [token for row in rows for token in (row if isinstance(row, list) else row["input_ids"])]


def kept(blocks: object) -> list[int]:
    return [token for block in blocks for token in block["input_ids"][block["labels"] != -100].tolist()]


def write(folder: Path, ending: str, texts: list[str]) -> str:
    path = folder / f"texts.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    elif ending == "csv":
        table(texts).to_csv(path, index=False)
    elif ending == "parquet":
        table(texts).to_parquet(path)
    else:
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


# ---- tokens ----------------------------------------------------------------------------------------------------


def test_packed_documents_end_with_eos_and_empty_ones_leave_nothing(tokenizer):
    rows = data.encode(["ab", "", None, "c"], tokenizer, eos=True, max_length=None)
    assert [len(row) for row in rows] == [3, 0, 0, 2]
    assert rows[0][-1] == rows[3][-1] == tokenizer.eos_token_id


def test_tokens_of_a_table_a_stream_and_a_list_are_the_same(tokenizer):
    from_list = joined(data.tokenize(TEXTS, tokenizer))
    assert joined(data.tokenize(table(), tokenizer)) == from_list
    assert joined(data.tokenize(table().to_iterable_dataset(), tokenizer)) == from_list


def test_text_that_is_no_text_is_refused(tokenizer):
    with pytest.raises(TypeError, match="int.*text_column"):
        data.encode([3], tokenizer, eos=True, max_length=None)


# ---- packing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 5, 16, 1000])
@pytest.mark.parametrize("source", ["list", "table", "selected", "joined"])
def test_packing_loses_no_token(tokenizer, block_size, source):
    documents = {
        "list": TEXTS,
        "table": table(),
        "selected": table(["x", *TEXTS, "y"]).select(range(1, 1 + len(TEXTS))),
        "joined": datasets.concatenate_datasets([table(TEXTS[:2]), table(TEXTS[2:])]),
    }[source]
    tokens = data.tokenize(documents, tokenizer)
    blocks = data.PackedBlocks(tokens, block_size, keep_remainder=True)
    everything = joined(data.tokenize(TEXTS, tokenizer))
    found = kept(blocks[index] for index in range(len(blocks)))
    assert found + everything[len(found) :] == everything
    assert len(everything) - len(found) == blocks.dropped_tokens <= 1
    assert all(len(blocks[index]["input_ids"]) == block_size for index in range(len(blocks)))


def test_training_drops_only_the_remainder_and_counts_it(tokenizer):
    tokens = data.tokenize(TEXTS, tokenizer)
    blocks = data.PackedBlocks(tokens, 16)
    assert blocks.dropped_tokens == blocks.num_tokens % 16 > 0
    assert kept(blocks[i] for i in range(len(blocks))) == joined(tokens)[: 16 * len(blocks)]


def test_less_than_one_block_is_padded_rather_than_dropped(tokenizer):
    blocks = data.PackedBlocks(data.tokenize(["abc"], tokenizer), 16, pad_token_id=7)
    assert len(blocks) == 1 and blocks.dropped_tokens == 0
    assert blocks[0]["labels"].tolist()[4:] == [-100] * 12
    assert blocks[0]["input_ids"].tolist()[4:] == [7] * 12


@pytest.mark.parametrize("block_size", [2, 5, 16, 1000])
@pytest.mark.parametrize("keep_remainder", [True, False])
def test_a_stream_is_packed_like_a_table(tokenizer, block_size, keep_remainder):
    tokens = data.tokenize(table(), tokenizer)
    blocks = data.PackedBlocks(tokens, block_size, keep_remainder)
    stream = list(data.PackedStream(tokens.to_iterable_dataset(), block_size, keep_remainder))
    if block_size == 1000 and not keep_remainder:
        assert stream == []  # a stream does not know that nothing else will come
        return
    assert len(stream) == len(blocks)
    for index, row in enumerate(stream):
        assert all(torch.equal(row[name], blocks[index][name]) for name in ("input_ids", "labels"))


def test_a_stream_split_over_workers_is_seen_once(tokenizer):
    texts = [letter * 15 for letter in "abcdefgh"]
    stream = data.tokenize(table(texts).to_iterable_dataset(num_shards=2), tokenizer)
    loader = torch.utils.data.DataLoader(data.PackedStream(stream, 16), batch_size=None, num_workers=2)
    found = sorted(tuple(row["input_ids"].tolist()) for row in loader)
    assert found == sorted(tuple(row) for row in data.tokenize(texts, tokenizer))


def test_the_number_of_blocks_can_be_limited(tokenizer):
    tokens = data.tokenize(table(), tokenizer)
    assert len(data.PackedBlocks(tokens, 5, max_blocks=2)) == 2
    assert len(list(data.PackedStream(tokens.to_iterable_dataset(), 5, max_blocks=2))) == 2


def test_nothing_to_learn_from_is_refused(tokenizer):
    with pytest.raises(ValueError, match="0 tokens; at least 2"):
        data.PackedBlocks(data.tokenize([""], tokenizer), 8)
    with pytest.raises(ValueError, match="0 tokens; at least 2"):
        data.PackedBlocks(datasets.Dataset.from_dict({"input_ids": []}), 8)
    with pytest.raises(ValueError, match="block_size.*at least 2.*got 1"):
        data.PackedBlocks([[1, 2, 3]], 1)


def test_a_training_stream_goes_on_where_a_pass_ends_and_shuffles_each_anew(tokenizer):
    texts = [letter * 6 for letter in "abcdefgh"]
    rows = data.tokenize(table(texts).to_iterable_dataset(num_shards=2), tokenizer)
    everything = joined(data.tokenize(texts, tokenizer))
    blocks = list(islice(data.PackedStream(rows, 8, repeat=True), 21))  # three passes of 7 blocks
    assert kept(blocks) == everything * 3
    options = {"repeat": True, "shuffle_buffer_size": 3}
    mixed = kept(islice(data.PackedStream(rows, 8, seed=1, **options), 21))
    passes = [mixed[start : start + len(everything)] for start in range(0, len(mixed), len(everything))]
    assert all(sorted(one) == sorted(everything) for one in passes) and passes[0] != passes[1] != passes[2]
    assert mixed == kept(islice(data.PackedStream(rows, 8, seed=1, **options), 21))
    assert mixed != kept(islice(data.PackedStream(rows, 8, seed=2, **options), 21))
    firsts = [row["input_ids"][0].item() for row in islice(data.TruncatedStream(rows, repeat=True), 16)]
    assert firsts == everything[::7] * 2


def test_an_endless_stream_of_nothing_ends_with_a_message(tokenizer):
    rows = data.tokenize(table(["", ""]).to_iterable_dataset(), tokenizer)
    for stream in (data.PackedStream(rows, 8, repeat=True), data.TruncatedStream(rows, repeat=True)):
        with pytest.raises(ValueError, match="holds nothing to train on"):
            next(iter(stream))


# ---- truncation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "table", "stream"])
def test_truncation_keeps_the_first_block_and_one_token(tokenizer, kind):
    block = 8
    texts = [*TEXTS, "x"]
    source = {"list": texts, "table": table(texts), "stream": table(texts).to_iterable_dataset()}[kind]
    tokens = data.tokenize(source, tokenizer, eos=False, max_length=block + 1)
    rows = data.TruncatedStream(tokens) if kind == "stream" else data.TruncatedDocuments(tokens)
    found = [row["input_ids"].tolist() for row in (rows if kind == "stream" else (rows[i] for i in range(len(rows))))]
    full = data.encode(texts, tokenizer, eos=False, max_length=None)
    assert found == [row[: block + 1] for row in full if len(row) >= 2]
    if kind != "stream":
        assert rows.dropped_documents == 2  # the empty one and the single letter predict nothing


def test_padding_is_neither_seen_nor_scored(tokenizer):
    collate = data.CausalLMCollator(pad_token_id=9)
    batch = collate([{"input_ids": torch.tensor([1, 9, 3])}, {"input_ids": torch.tensor([4, 5])}])
    assert batch["input_ids"].tolist() == [[1, 9, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 9, 3], [4, 5, -100]]  # a real token is scored whatever its id
    assert data.CausalLMCollator(9, pad_to=6)([{"input_ids": torch.tensor([1, 2])}])["input_ids"].shape == (1, 6)


def test_documents_too_short_to_predict_anything_are_refused(tokenizer):
    with pytest.raises(ValueError, match="None of the 2 documents"):
        data.TruncatedDocuments([[], [1]])


# ---- sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_every_format_gives_the_same_documents(tmp_path, ending, streaming):
    texts = [text for text in TEXTS if text]
    path = write(tmp_path, ending, texts)
    source = data.load_files({"train": [path]}, streaming, text_unit="line" if ending == "txt" else None)["train"]
    assert [row["text"] for row in source] == texts
    assert data.is_stream(source) == streaming


def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path):
    path = write(tmp_path, "txt", TEXTS)
    source = data.load_named(path)["train"]
    assert [row["text"] for row in source] == ["\n".join(TEXTS) + "\n"]


def test_local_folders_are_data_sets(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", "jsonl", TEXTS)
    datasets.DatasetDict({"train": table(), "validation": table(["v"])}).save_to_disk(tmp_path / "saved")
    assert data.load_named(str(tmp_path / "files"))["train"]["text"] == TEXTS
    assert data.load_named(str(tmp_path / "saved"))["validation"]["text"] == ["v"]


def test_the_embedded_text_is_whole():
    splits = data.load_named("tiny_shakespeare")
    assert list(splits) == ["train", "validation", "test"]
    assert "".join(text for texts in splits.values() for text in texts) == shakespeare_path().read_bytes().decode()


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("as_table", [False, True])
def test_a_validation_split_takes_the_end_and_overlaps_nothing(count, as_table):
    texts = [f"document number {index}" for index in range(count)]
    source = table(texts) if as_table else texts
    parts = data.split_off_validation(source, 10)
    train, validation = ([row["text"] if isinstance(row, dict) else row for row in part] for part in parts)
    assert "".join(train + validation) == "".join(texts)
    assert len("".join(validation)) > 0 and len("".join(train)) > len("".join(validation)) or count == 2


def test_wrong_sources_are_refused_in_words(tmp_path):
    path = write(tmp_path, "jsonl", TEXTS)
    with pytest.raises(ValueError, match="no column 'body'. Columns: text"):
        data.find_text_column(data.load_files({"train": [path]})["train"], "body")
    with pytest.raises(ValueError, match="no column 'body'. Columns: text"):
        data.find_text_column(data.load_files({"train": [path]}, streaming=True)["train"], "body")
    two = datasets.Dataset.from_dict({"title": ["a"], "body": ["b"]})
    with pytest.raises(ValueError, match="text_column.*title, body"):
        data.find_text_column(two)
    assert data.find_text_column(two.select_columns(["body"])) == "body"
    with pytest.raises(FileNotFoundError, match="train file .*nowhere.jsonl"):
        data.load_files({"train": [str(tmp_path / "nowhere.jsonl")]})
    (tmp_path / "data.docx").write_text("x")
    with pytest.raises(ValueError, match="format of .*docx.*Allowed endings: .txt"):
        data.load_named(str(tmp_path / "data.docx"))
    with pytest.raises(ValueError, match="one format, got json, text"):
        data.load_files({"train": [path], "validation": [write(tmp_path, "txt", TEXTS)]})
    with pytest.raises(ValueError, match="cannot be streamed"):
        data.load_named("tiny_shakespeare", streaming=True)
    with pytest.raises(ValueError, match="between 0 and 100, got 100"):
        data.split_off_validation(TEXTS, 100)
    with pytest.raises(ValueError, match="stream has no last part"):
        data.split_off_validation(table().to_iterable_dataset(), 5)
    datasets.DatasetDict({"validation": table()}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(ValueError, match="no split 'train'. Splits: validation"):
        data.load_named(str(tmp_path / "no_train"))


@pytest.mark.parametrize("name", ["a.txt", "b.JSONL", "c.json.gz", "d.parquet", "e.csv.zst"])
def test_formats_are_known_by_their_names(name):
    assert data.loader_of(name) in ("text", "json", "parquet", "csv")


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_files_patterns_and_several_files_are_read(tmp_path, streaming):
    for number, text in enumerate(["ab", "cd"]):
        line = json.dumps({"text": text}).encode()
        (tmp_path / f"part{number}.jsonl.gz").write_bytes(gzip.compress(line))
    pattern, both = str(tmp_path / "part*.jsonl.gz"), [str(tmp_path / f"part{number}.jsonl.gz") for number in (0, 1)]
    for paths in ([pattern], both):
        assert [row["text"] for row in data.load_files({"train": paths}, streaming)["train"]] == ["ab", "cd"]
    assert data.loader_of("https://example.org/a/texts.jsonl.gz?download=true") == "json"
    with pytest.raises(ValueError, match="is a folder. Give its files"):
        data.load_files({"train": [str(tmp_path)]})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_text_files_is_cut_as_a_file_is(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    read = {
        unit: [row["text"].strip() for row in data.load_named(str(tmp_path), None, streaming, unit)["train"]]
        for unit in (None, "paragraph", "line")
    }
    assert read[None] == ["one\ntwo\n\nthree"]
    assert [text.strip() for text in read["paragraph"]] == ["one\ntwo", "three"]
    assert [text for text in read["line"] if text] == ["one", "two", "three"]
    write(tmp_path, "jsonl", TEXTS)
    with pytest.raises(ValueError, match="`text_unit` is about .txt files"):
        data.load_files({"train": [str(tmp_path / "texts.jsonl")]}, streaming, text_unit="line")


def test_data_that_cannot_be_read_are_named_with_the_cause(tmp_path, monkeypatch):
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="torn.jsonl cannot be read: .*JSON.*Check the files"):
        data.load_files({"train": [str(tmp_path / "torn.jsonl")]})
    with pytest.raises(FileNotFoundError, match="No train file matches '.*none.*.txt'. Check the pattern"):
        data.load_files({"train": [str(tmp_path / "none*.txt")]})
    with pytest.raises(ValueError, match="cannot be reached: .*some/where.*Check the name and the connection"):
        data.load_named("some/where")
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    with pytest.raises(ImportError, match="a.txt.zst' needs zstandard to be read: pip install zstandard"):
        data.load_files({"train": [str(tmp_path / "a.txt.zst")]})


# ---- splits ----------------------------------------------------------------------------------------------------

SPLIT_ROWS = {"train": list("abcdefgh"), "val": list("ij"), "test": list("kl"), "extra": list("mn")}


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ("abcdefgh", "ij", "kl")),
        ({"train": "train[:25%]"}, ("ab", "ij", "kl")),
        ({"train": "train[2:]+extra", "validation": "train[:2]"}, ("cdefghmn", "ab", "kl")),
        ({"train": "val"}, ("ij", None, "kl")),  # what is trained on validates nothing
        ({"train": "extra", "validation": "test"}, ("mn", "kl", None)),
        ({"train": None, "test": "extra"}, ("abcdefgh", "ij", "mn")),
    ],
)
def test_splits_are_taken_by_their_names_and_in_parts(wanted, expected, as_table):
    available = {name: table(rows) if as_table else rows for name, rows in SPLIT_ROWS.items()}
    found = choose_splits(available, wanted)
    texts = {role: "".join(rows["text"] if as_table else rows) for role, rows in found.items()}
    assert texts == {role: text for role, text in zip(SPLITS, expected, strict=True) if text is not None}


@pytest.mark.parametrize(
    ("available", "wanted", "message"),
    [
        (SPLIT_ROWS, {"train": "trian"}, "`train_split` 'trian': no split 'trian'. Splits: train, val, test, extra"),
        (SPLIT_ROWS, {"train": "train[:x]"}, "is no part of a split: .*Write for instance"),
        (SPLIT_ROWS, {"validation": "val[5:]"}, "holds nothing"),
        ({**SPLIT_ROWS, "dev": ["x"]}, {}, "Both val and dev look like validation data.*`validation_split`"),
        ({"all": ["x"]}, {}, "no split 'train'. Splits: all. Choose one to train on with `train_split`"),
        (SPLIT_ROWS, {"eval": "val"}, "chosen for train, validation, test, got eval"),
    ],
)
def test_splits_that_are_not_there_are_refused_in_words(available, wanted, message):
    with pytest.raises(ValueError, match=message):
        choose_splits(available, wanted)


# ---- conversations ---------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"


def test_conversations_are_written_down_with_the_chat_template(tokenizer, monkeypatch):
    source = datasets.Dataset.from_list([{"messages": CHAT, "id": 1}, {"messages": CHAT[:1], "id": 2}])
    for documents in (source, source.to_iterable_dataset()):
        with pytest.raises(ValueError, match="no chat template.*fine-tune with TRL"):
            data.tokenize(documents, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    expected = data.encode(["[user]hi[assistant]ho", "[user]hi"], tokenizer, eos=True, max_length=None)
    for documents in (source, source.to_iterable_dataset()):
        assert [row["input_ids"] for row in data.tokenize(documents, tokenizer)] == expected
    assert data.find_text_column(source.add_column("text", ["a", "b"])) == "text"


def test_rows_for_other_trainers_are_refused_with_their_name(tokenizer):
    source = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(ValueError, match="Name the text with `text_column`; columns: prompt, completion; or .*TRL"):
        data.find_text_column(source)
    with pytest.raises(TypeError, match="must be strings, got list.*TRL"):
        data.encode([[{"from": "human", "value": "hi"}]], tokenizer, eos=True, max_length=None)


# ---- ebt train clm ---------------------------------------------------------------------------------------------

TINY_RUN = (
    "--use_cpu --disable_tqdm true --report_to none --tokenizer_name tiny_shakespeare --block_size 8 "
    "--config_overrides hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2 "
    "--lr_scheduler_type constant --warmup_steps 0 --learning_rate 1e-2"
)


def run(out: Path, options: str) -> dict[str, torch.Tensor]:
    run_clm.main(f"--output_dir {out} {TINY_RUN} {options}".split())
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("packing", ["", "--no_packing"])
def test_an_interrupted_and_resumed_stream_equals_an_uninterrupted_one(tmp_path, packing):
    """Ten short documents, of which two are held out: a few steps of two rows are several passes."""
    path = write(tmp_path, "jsonl", [f"line {number} of ten" for number in range(10)])
    common = f"--train_file {path} --streaming --shuffle_buffer_size 4 --max_eval_samples 2 {packing}"
    common += " --per_device_train_batch_size 4 --save_steps 5"
    whole = run(tmp_path / "whole", f"{common} --max_steps 9")
    run(tmp_path / "halves", f"{common} --max_steps 5")
    resumed = run(tmp_path / "halves", f"{common} --max_steps 9")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_script_takes_parts_of_splits(tmp_path, capsys):
    texts = {"train": ["first " * 9] * 8, "dev": ["second " * 9], "rest": ["third " * 9]}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({name: table(rows) for name, rows in texts.items()}).save_to_disk(folder)
    options = f"--dataset_name {folder} --max_steps 1 --no_packing"
    run(tmp_path / "out", f"{options} --train_split train[:25%]+rest --test_split train[6:]")
    shown = capsys.readouterr().out
    for part in ("train: 3 documents", "validation: 1 documents", "test: 2 documents"):
        assert part in shown
    for refused, message in (
        ("--train_split rest[:0]", "holds nothing"),
        ("--dataset_name tiny_shakespeare --text_unit line", "`text_unit` is about .txt files"),
        ("--dataset_name tiny_shakespeare --dataset_config_name x", "has no configurations"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "refused", f"{options} {refused}")
    with pytest.raises(SystemExit, match="--train_split needs --dataset_name"):
        run(tmp_path / "refused", f"--train_file {write(tmp_path, 'txt', TEXTS)} --train_split train")
