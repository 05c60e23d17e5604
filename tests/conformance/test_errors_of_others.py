"""What another library or the system raises over a caller's input: a ValueError of one line.

Its cause is kept, so that nothing is lost.
"""

import json
import shutil

import huggingface_hub
import pytest
from device import build
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer, models, pre_tokenizers

from nanovllm import SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]


def refused(call, *arguments, **options) -> ValueError:
    """The ValueError of a call: one line, with the cause of another class or module."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    error = caught.value
    assert type(error) is ValueError and str(error) and "\n" not in str(error)
    assert error.__cause__ is not None, "the cause is lost"
    return error


TEMPLATES = {
    "{{ raise_exception('only a system message may come first') }}": "only a system message",
    "{{ messages[0].content + 5 }}": "",
    "{{ 1 / 0 }}": "zero",
    "{% for %}": "",
    "{{ nothing.at.all }}": "nothing",
    "{% include 'other' %}": "",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails_is_a_value_error(template, llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    assert TEMPLATES[template] in str(refused(llm.chat, HELLO, use_tqdm=False))
    assert "chat template" in str(refused(llm.apply_chat_template, HELLO))
    assert llm.is_finished()


@pytest.mark.parametrize(
    "model", ["~nosuchuser/m", "a/" + "x" * 300, "\0/x", "a/b/c\ud800", "no\nsuch/model\n"]
)
def test_a_folder_that_the_system_cannot_look_up_is_a_value_error(model):
    with pytest.raises(ValueError) as caught:
        build(model)
    assert str(caught.value).startswith("model ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["~nosuchuser/m", "a/" + "x" * 300])
def test_the_systems_own_words_are_kept_as_the_cause(model):
    refused(build, model)


ERRORS = [
    OSError(""),
    RuntimeError("\n  \n"),
    KeyError("etag"),
    ConnectionError("no route to host\nsecond line"),
    PermissionError(13, "Permission denied"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_download_that_fails_is_a_value_error(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    raised = refused(build, "nobody/nothing")
    assert raised.__cause__ is error and "nobody/nothing" in str(raised)
    assert str(raised).split(": ", 1)[1].strip(), "it gives no reason"


@pytest.mark.parametrize("call", ["is_file", "read_bytes", "is_dir", "glob"])
def test_a_permission_denied_is_a_value_error(call, bundled, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(bundled), call, deny)
    assert "Permission denied" in str(refused(build, bundled))


def test_a_weights_file_without_permission_is_a_value_error(bundled, monkeypatch):
    import nanovllm.utils.loader as loader

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loader, "safe_open", deny)
    assert "model.safetensors" in str(refused(build, bundled))


def test_a_tokenizer_that_cannot_encode_is_a_value_error(bundled, tmp_path):
    """A vocabulary of whole words with no token for the unknown one."""
    folder = shutil.copytree(bundled, tmp_path / "model")
    words = Tokenizer(models.WordLevel({"hello": 0, "there": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    llm = build(folder)
    assert len(llm.generate("hello there", SamplingParams(max_tokens=1), use_tqdm=False)) == 1
    refused(llm.generate, "goodbye", use_tqdm=False)
    refused(llm.chat, [{"role": "user", "content": "goodbye"}], use_tqdm=False)
    refused(llm.stream, "goodbye")
    assert llm.is_finished()
    llm.exit()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_cannot_be_decoded_is_a_value_error_with_its_cause(
    name, content, bundled, tmp_path
):
    folder = shutil.copytree(bundled, tmp_path / "model")
    (folder / name).write_bytes(content)
    assert name in str(refused(build, folder))


def test_everything_that_a_model_of_the_hub_needs_is_fetched(bundled, tmp_path, monkeypatch):
    """Its chat templates in files of their own included, and no pickle."""
    hub = shutil.copytree(bundled, tmp_path / "hub")
    config = json.loads((hub / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    (hub / "tokenizer_config.json").write_text(json.dumps(config))
    (hub / "chat_template.jinja").write_text(template)
    (hub / "additional_chat_templates").mkdir()
    (hub / "additional_chat_templates/brief.jinja").write_text("{{ messages[0].content }}")
    (hub / "pytorch_model.bin").write_bytes(b"pickle")
    (hub / "README.md").write_text("words")

    def fetch(name, allow_patterns=None, **_):
        assert name == "someone/model"
        there = [p.relative_to(hub).as_posix() for p in hub.rglob("*") if p.is_file()]
        for file in filter_repo_objects(there, allow_patterns=allow_patterns):
            copy = tmp_path / "cache" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, copy)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    llm, original = build("someone/model"), build(bundled)
    assert llm.apply_chat_template(HELLO) == original.apply_chat_template(HELLO)
    brief = llm.apply_chat_template(HELLO, {"chat_template": "brief"})
    assert brief == original.encode("Hello")
    assert not (tmp_path / "cache/pytorch_model.bin").exists()
    for engine in (llm, original):
        engine.exit()
