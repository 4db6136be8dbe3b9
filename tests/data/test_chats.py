"""Chats in token shards, and in the windows that a model sees."""

import dataclasses
import json

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import shards, streams, template
from prmoe_jax.data.pipeline import Windows, load_data, windows_fingerprint
from prmoe_jax.data.shards import Index, Shard
from prmoe_jax.errors import UserError
from prmoe_jax.model.loss import forward
from tests.support import chats, models
from tests.support.chats import END, START, turns, write_lines, write_model
from tests.support.tokenizers import started_tokenizer

LINES = [{"messages": turns(f"Question {i}<|im_end|>", f"{i * i}.")} for i in range(9)]
PAIRS = [{"prompt": f"{i}+{i}=", "completion": f" {i + i}"} for i in range(9)]


def loaded(tmp_path, *lines, length=64, **values):
    """The data of JSON lines, with a tokenizer that has a template beside it."""
    if not (tmp_path / "model").exists():
        write_model(tmp_path / "model")
    path = write_lines(tmp_path / "text.jsonl", *lines)
    given = {"corpus": str(path), "cache_dir": str(tmp_path / "cache")}
    given["tokenizer"] = str(tmp_path / "model/tokenizer.json")
    return load_data(DataConfig(**given | values), 384, length)


def joined(windows: Windows):
    """All windows, one after the other; segments count on from window to window."""
    batches = [windows[i] for i in range(len(windows))]
    return [np.concatenate([np.asarray(batch[i]) for batch in batches]) for i in range(4)]


def stream_of(parts, tokenizer):
    """A stream of marked documents in memory."""
    tokens_T = np.concatenate(parts)
    shard = Shard(None, tokens_T.dtype, 0, len(tokens_T), marked=True)
    shard.__dict__["ids_T"] = tokens_T  # instead of a file
    return streams.ShardStream([shard], tokenizer, 0, len(tokens_T), (False, True), "")


def test_a_window_by_hand():
    """Chats without a start but the template's, text with BOS; loss on answers; one mark apart."""
    tokenizer = chats.chat_tokenizer()  # BOS is 256, EOS the end of a turn
    bos, text = tokenizer.bos_id, tokenizer.encode
    chat = shards.document([START, 7, END, 8, END], END, [False, False, False, True, True, False],
                           True)  # fmt: skip
    pair = shards.document([5, 6], END, [False, True, True], False)
    plain = np.append(END, text("a")).astype(np.uint32)
    windows = Windows(stream_of([chat, pair, plain], tokenizer), 12, False, tokenizer=tokenizer)
    batch = windows[0]
    a = text("a")[0]
    # inputs           apart START  7    END  8    END  BOS  5   6    BOS  a
    assert batch.tokens_BxL[:11].tolist() == [END, START, 7, END, 8, END, bos, 5, 6, bos, a]
    assert batch.targets_BxL[:11].tolist() == [START, 7, END, 8, END, END, 5, 6, END, a, END]
    assert batch.mask_BxL.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0]
    assert batch.segments_BxL.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0]
    across = dataclasses.replace(windows, cross_document_attention=True)[0]
    assert across.segments_BxL.tolist() == [1] * 11 + [0]
    assert across.mask_BxL.tolist() == batch.mask_BxL.tolist()
    assert windows.documents().tolist() == [0] * 6 + [1] * 3 + [2] * 3


def test_json_lines_become_marked_shards(tmp_path):
    """The ids are the template's, the content's marks are plain text, and old readers refuse."""
    data = loaded(tmp_path, *LINES)
    tokenizer, found = data.tokenizer, []
    for windows in (data.train, data.validation):
        tokens, targets, mask, segments = joined(windows)
        shown = tokens[segments > 0]
        assert (shown == START).sum() == (shown == END).sum() == 2 * windows.documents()[-1] + 2
        found.append(tokenizer.decode(targets[mask]))
    assert sorted("".join(found).splitlines()) == sorted(f"{i * i}.<|im_end|>" for i in range(9))
    assert data.train.text_bytes == 0 and data.validation.text_bytes == len(found[1]) - 10
    index = json.loads(next(tmp_path.glob("cache/tokens/*/index.json")).read_text())
    assert (index["format"], index["dtype"]) == ("prmoe_jax tokens 2", "<u4")
    assert windows_fingerprint(data)["chat_template"] == data.chat_template.fingerprint


@pytest.mark.parametrize("bpe", [False, True])
def test_prompts_and_completions_need_no_template(bpe, tmp_path):
    """They are text, also for a BPE that is trained on them; their end carries loss."""
    values = {"tokenizer": "bpe"} if bpe else {"tokenizer": "bytes"}
    data = loaded(tmp_path, *PAIRS, **values)
    end = data.tokenizer.decode([data.tokenizer.eos_id])
    found = [
        data.tokenizer.decode(joined(w)[1][joined(w)[2]]) for w in (data.train, data.validation)
    ]
    expected = sorted(pair["completion"] for pair in PAIRS)
    assert sorted("".join(found).split(end)[:-1]) == expected
    assert data.chat_template is None


def test_text_among_chats(tmp_path):
    """A corpus may hold both; all tokens of text carry loss, and alone it is stored as ever."""
    texts = [{"text": f"Text {i}.", "messages": 3} for i in range(9)]
    data = loaded(tmp_path, *LINES, *texts)
    said = "".join(
        data.tokenizer.decode(joined(w)[1][joined(w)[2]]) for w in (data.train, data.validation)
    )
    for i in range(9):
        assert said.count(f"Text {i}.<|im_end|>") == 1 and f"Question {i}" not in said
    alone = loaded(tmp_path, *texts)
    paths = tmp_path.glob("cache/tokens/*/index.json")
    formats = {(i["format"], i["dtype"]) for i in (json.loads(p.read_text()) for p in paths)}
    assert formats == {("prmoe_jax tokens 2", "<u4"), ("prmoe_jax tokens 1", "<u2")}
    assert alone.chat_template is None and "chat_template" not in windows_fingerprint(alone)
    assert alone.train.stream.read(0, 9).max() <= END
    lists = loaded(tmp_path, *({"text": "x"} | line for line in LINES), text_field="messages")
    assert joined(lists.train)[2].sum() == joined(loaded(tmp_path, *LINES).train)[2].sum()


def test_another_template_makes_other_tokens(tmp_path):
    first = loaded(tmp_path, *LINES)
    path = tmp_path / "model/chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n", "assistant\n").replace("user", "User"))
    path.write_text("Hello! " + path.read_text())
    second = loaded(tmp_path, *LINES)
    assert first.corpus_fingerprint == second.corpus_fingerprint
    assert windows_fingerprint(first) != windows_fingerprint(second)
    assert len(second.train.stream) == len(first.train.stream) + 7 * 8


def test_errors_name_the_line(tmp_path):
    with pytest.raises(UserError, match="text.jsonl:2: field 'messages' has no message"):
        loaded(tmp_path, LINES[0], {"messages": turns("a")})
    with pytest.raises(UserError, match="text.jsonl:1: messages need a chat template, and none"):
        loaded(tmp_path, *LINES, tokenizer="bytes")
    with pytest.raises(UserError, match="text.jsonl:1: no field 'text'; it has prompt, id"):
        loaded(tmp_path, {"prompt": "a", "id": 1})
    with pytest.raises(UserError, match="text.jsonl:1: a message holds half of a surrogate pair"):
        loaded(tmp_path, {"messages": turns("a", "\ud800")})


def test_an_index_whose_marks_do_not_fit(tmp_path):
    loaded(tmp_path, *LINES)
    path = next(tmp_path.glob("cache/tokens/*/index.json"))
    index = json.loads(path.read_text())
    for changed in ({"dtype": "<u2"}, {"format": "prmoe_jax tokens 3"}):
        path.write_text(json.dumps(index | changed))
        with pytest.raises(UserError, match="is damaged: (dtype|format) is"):
            Index.open(path.parent)
    path.write_text(json.dumps(index | {"format": "prmoe_jax tokens 1"}))
    known = chats.chat_tokenizer()
    with pytest.raises(UserError, match="has the id [0-9]{9,} at token 0"):
        streams.of_index(Index.open(path.parent), known).train.read(0, 9)


messages = st.lists(st.text("ab<|im_end|>é", max_size=9), min_size=2, max_size=4)
documents = st.lists(
    st.one_of(
        messages.map(lambda texts: {"messages": turns(*texts)}),
        st.tuples(st.text(max_size=5), st.text(max_size=5)).map(
            lambda pair: dict(zip(("prompt", "completion"), pair, strict=True))
        ),
    ),
    min_size=1,
    max_size=5,
)


def tokens_of(lines, tokenizer):
    """Each document's tokens as in a shard."""
    found = [template.encode(chats.parsed(**line), tokenizer, chats.template()) for line in lines]
    return [shards.document(x.ids, tokenizer.eos_id, x.loss, x.apart) for x in found]


def windows_of(parts, tokenizer, length):
    return Windows(stream_of(parts, tokenizer), length, False, tokenizer=tokenizer)


@pytest.mark.parametrize("ends", [(END,), (256,)])
@given(lines=documents, length=st.integers(1, 40))
def test_windows_of_any_length_have_the_loss_of_the_documents(ends, lines, length):
    """Wherever windows cut: the same targets with loss, in order, and the same inputs."""
    tokenizer = chats.chat_tokenizer(ends=ends)
    parts = tokens_of(lines, tokenizer)
    tokens, targets, mask, segments = joined(windows_of(parts, tokenizer, length))
    each = [joined(windows_of([part], tokenizer, len(part))) for part in parts]
    for i, found in enumerate((tokens, targets)):
        assert found[mask].tolist() == [int(x) for one in each for x in one[i][one[2]]]
    assert mask.sum() == sum(int((part < shards.SILENT).sum()) for part in parts)
    # Documents count through the windows, whatever marks of the template are in them.
    numbers = windows_of(parts, tokenizer, length).documents()
    expected = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    assert numbers[: len(expected)].tolist() == expected.tolist()


def test_a_packed_batch_has_the_loss_of_its_documents_alone():
    """No document sees another one, and what carries no loss adds nothing."""
    model = models.build("2 layers, E=2", moe={"eval_capacity_factor": np.inf}, length=256)
    lines = [{"messages": turns("a<|im_end|>", "bc", "", "é")}, {"prompt": "ab", "completion": "c"}]
    lines += [{"messages": turns("b", "")}, {"prompt": "", "completion": "aa<|im_end|>"}]
    tokenizer = chats.chat_tokenizer()
    parts = tokens_of(lines, tokenizer)
    measure = jax.jit(forward)

    def loss(parts):
        batch = windows_of(parts, tokenizer, 256)[0]
        found = measure(model, jax.tree.map(lambda x: x[None], batch))
        return np.array([found.tokens, found.lm_loss], np.float64)

    np.testing.assert_allclose(loss(parts), sum(loss([part]) for part in parts), rtol=1e-5)


def test_a_template_that_writes_the_start_of_a_text_itself():
    """BOS stands there once, as the template writes it."""
    tokenizer = started_tokenizer()
    source = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    found = template.encode(
        chats.parsed(messages=turns("a", "b")), tokenizer, chats.template(source)
    )
    parts = [shards.document(found.ids, tokenizer.eos_id, found.loss, found.apart)]
    tokens, _, mask, segments = joined(windows_of(parts, tokenizer, 4))
    assert tokens[segments > 0].tolist() == [257, *tokenizer.encode("ab")]
    assert mask.tolist() == [False, False, True, False]
