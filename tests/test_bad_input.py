"""Input that cannot be stored is refused before anything is written; odd ids stay apart."""

import math
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat.errors import (
    ConfigurationError,
    InvalidInputError,
    SchemaError,
    SealError,
    UnavailableError,
    UnknownKeyError,
)
from langgraph_vat.keyring import Keyring
from langgraph_vat.saver import HybridSaver
from langgraph_vat.settings import Settings
from langgraph_vat.store import SemanticStore
from langgraph_vat.vat import Vat

ODD = ["*", ":", "{a}", "a|b", "100%", "[a]", "a\nb", "\N{GRINNING FACE}", "a", "a*", "?"]


@pytest.fixture
def saver(postgres_url: str, redis_url: str) -> Iterator[HybridSaver]:
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, flush_every=3) as made:
        yield made


def at(thread_id: Any) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


@pytest.mark.parametrize("thread_id", ["", 7, None, "a\0b", "x" * 10_000, "\ud800"])
def test_refused_id_writes_nothing(saver: HybridSaver, postgres_url: str, thread_id: Any) -> None:
    with pytest.raises(InvalidInputError):
        saver.put(at(thread_id), empty_checkpoint(), {}, {})
    saver.flush()
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM checkpoints").fetchone() == (0,)


def test_odd_ids_are_isolated(saver: HybridSaver) -> None:
    ids = {odd: saver.put(at(odd), empty_checkpoint(), {}, {}) for odd in ODD}
    saver.delete_thread("*")
    assert saver.get_tuple(at("*")) is None
    for odd in ODD[1:]:
        found = saver.get_tuple(at(odd))
        assert found is not None
        assert found.config == ids[odd]


def test_unusable_settings_and_keys() -> None:
    with pytest.raises(ConfigurationError):
        Settings(flush_every=0)
    for wrong in ({"flush_every": "3"}, {"flush_every": True}, {"flush_after": math.inf}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Settings(**wrong)
    with pytest.raises(ConfigurationError):
        Keyring([("k", b"short")])
    with pytest.raises(ConfigurationError, match="KeyWrapper, not str"):
        HybridSaver.from_conn_string("postgresql://h/db", keyring="abc")
    with pytest.raises(ConfigurationError, match="dumps_typed"):
        HybridSaver.from_conn_string("postgresql://h/db", serde=object())
    with pytest.raises(ConfigurationError, match="KeyWrapper, not bytes"):
        SemanticStore.from_conn_string("postgresql://h/db", keyring=b"k")


ABSENT = {"configurable": {"checkpoint_ns": ""}}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.get_tuple(ABSENT), "thread_id is missing"),
        (lambda s: s.get_tuple({}), "configurable"),
        (lambda s: list(s.list(at(""))), "thread_id must not be empty"),
        (lambda s: s.put(at("t") | {}, {**empty_checkpoint(), "id": "x" * 200}, {}, {}), "128"),
        (lambda s: s.put_writes(at("t"), [("a", 1)], "task"), "checkpoint_id is missing"),
        (lambda s: s.put_writes(inside("c"), [("a\0", 1)], "task"), "channel name has a NUL"),
        (lambda s: s.put_writes(inside("c"), [("a", 1)], ""), "task_id must not be empty"),
        (lambda s: s.delete_thread(7), "pass str|Pass str"),
        (lambda s: s.prune(["t"], strategy="all"), "delete.*keep_latest"),
        (lambda s: s.prune("t"), "sequence"),
        (lambda s: s.delete_for_runs("r"), "sequence"),
        (lambda s: s.copy_thread("never", "t"), "no thread 'never'"),
        (lambda s: s.scoped(""), "tenant must not be empty"),
        (lambda s: s.get_tuple(at("vat-tenant:1:x:t")), "scoped"),
        (lambda s: s.get_tuple(None), "config must be a mapping, not NoneType"),
        (lambda s: s.get_tuple("t"), "config must be a mapping, not str"),
        (lambda s: s.get_tuple({"configurable": None}), "configurable.* must be a mapping"),
        (lambda s: s.put(None, empty_checkpoint(), {}, {}), "config must be a mapping"),
        (lambda s: s.put_writes(None, [], "task"), "config must be a mapping"),
        (lambda s: s.put(at("t") | {"metadata": 3}, empty_checkpoint(), {}, {}), "'metadata'"),
        (lambda s: s.get_tuple({"configurable": {"thread_id": "t", 1: 2}}), "keys of config"),
        (lambda s: s.get_tuple(inside(0)), "checkpoint_id must be a string, not int"),
        (lambda s: s.put(at("t"), {}, {}, {}), "checkpoint_id is missing from the checkpoint"),
        (lambda s: s.put(at("t"), None, {}, {}), "checkpoint must be a mapping"),
        (lambda s: s.put(at("t"), without("channel_versions"), {}, {}), "no 'channel_versions'"),
        (lambda s: s.put(at("t"), without("channel_values"), {}, {}), "no 'channel_values'"),
        (lambda s: s.put(at("t"), {**empty_checkpoint(), "channel_values": []}, {}, {}), "mapping"),
        (lambda s: s.put(at("t"), empty_checkpoint(), {}, None), "new_versions must be a mapping"),
        (lambda s: s.put(at("t"), empty_checkpoint(), None, {}), "metadata must be a mapping"),
        (lambda s: s.put(at("t"), empty_checkpoint(), {"a": endless()}, {}), "the metadata cannot"),
        (lambda s: s.put(at("t"), empty_checkpoint(), {"a": object()}, {}), "the metadata cannot"),
        (lambda s: s.put(at("t"), empty_checkpoint(), {"a": deep(260)}, {}), "the metadata is nes"),
        (lambda s: s.put(at("t"), {**empty_checkpoint(), "x": endless()}, {}, {}), "a field of"),
        (lambda s: s.put_writes(inside("c"), [("a", 1, 2)], "task"), "pair"),
        (lambda s: s.put_writes(inside("c"), [("a", 1), "ab"], "task"), "pair"),
        (lambda s: s.put_writes(inside("c"), None, "task"), "writes must be pairs"),
        (lambda s: s.put_writes(inside("c"), [(None, 1)], "task"), "missing from a pair of writes"),
        (lambda s: s.put_writes(inside("c"), [("a", 1)], None), "task_id is missing from the arg"),
        (lambda s: s.put_writes(inside("c"), [("a", 1)], "t", None), "task_path is missing from t"),
        (lambda s: s.put_writes(of_run("r\0"), [("a", 1)], "task"), "run_id has a NUL"),
        (lambda s: s.delete_thread(None), "thread_id is missing from the arguments"),
        (lambda s: s.copy_thread(None, "t"), "thread_id is missing from the arguments"),
        (lambda s: s.scoped("a").delete_thread(None), "thread_id is missing from the arguments"),
        (lambda s: s.scoped(None), "tenant is missing from the arguments"),
        (lambda s: s.prune(None), "thread_ids must be a sequence"),
        (lambda s: s.prune([None]), "thread_id is missing from thread_ids"),
        (lambda s: s.delete_for_runs(None), "run_ids must be a sequence"),
        (lambda s: s.delete_for_runs([None]), "run_id is missing from run_ids"),
        (lambda s: list(s.list(None, before=inside(7))), "checkpoint_id must be a string"),
        (lambda s: list(s.list(None, before=inside("a\0"))), "checkpoint_id has a NUL"),
        (lambda s: list(s.list(None, before="c")), "config must be a mapping"),
        (lambda s: list(s.list({"thread_id": "t"})), "configurable"),
        (lambda s: list(s.list(None, limit="3")), "limit"),
        (lambda s: list(s.list(None, limit=1.5)), "limit"),
        (lambda s: list(s.list(None, limit=True)), "limit"),
        (lambda s: list(s.list(None, limit=-1)), "limit"),
        (lambda s: list(s.list(None, filter="x")), "filter must be a mapping"),
        (lambda s: list(s.list(None, filter={1: 2})), "keys of filter"),
    ],
)
def test_the_error_names_the_cause(saver: HybridSaver, call: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        call(saver)
    assert list(saver.list(None)) == []


def inside(checkpoint_id: Any) -> Any:
    return {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": checkpoint_id}}


def of_run(run_id: str) -> Any:
    return {**inside("c"), "metadata": {"run_id": run_id}}


def without(part: str) -> Any:
    return {key: value for key, value in empty_checkpoint().items() if key != part}


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


async def test_the_asyncio_face_refuses_the_same(saver: HybridSaver) -> None:
    calls: list[Any] = [
        saver.aput(at("t"), without("id"), {}, {}),
        saver.aput_writes(inside("c"), ["ab"], "task"),
        saver.aget_tuple(None),
        saver.adelete_thread(None),
        anext(saver.alist(None, limit=-1)),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError):
            await call
    await saver.aclose()


def test_odd_but_sensible_input_is_taken_as_langgraph_takes_it(saver: HybridSaver) -> None:
    odd = {**empty_checkpoint(), "a\0": 1}
    config = saver.put(at("t"), odd, {1: "one", "step": 1}, {})  # type: ignore[dict-item]
    saver.put_writes(config, (pair for pair in [("a", 1)]), "task")
    saver.flush()
    (found,) = saver.list({}, before={}, filter={}, limit=10**30)
    assert found.metadata == {1: "one", "step": 1}
    assert found.checkpoint == odd
    assert found.pending_writes == [("task", "a", 1)]
    assert list(saver.list(None, before={"configurable": {}}, limit=1)) == [found]
    assert list(saver.list(None, limit=0)) == []


@pytest.mark.parametrize("redis_is_there", [True, False])
def test_a_refused_checkpoint_leaves_the_thread_as_it_was(
    postgres_url: str, redis_url: str, redis_is_there: bool
) -> None:
    url = redis_url if redis_is_there else None
    with HybridSaver.from_conn_string(postgres_url, redis=url) as saver:
        config = saver.put(at("t"), empty_checkpoint(), {"step": 0}, {})
        for metadata in ({"a": endless()}, {"a": deep(260)}):
            with pytest.raises(InvalidInputError):
                saver.put(config, empty_checkpoint(), metadata, {})
        assert [one.config for one in saver.list(None)] == [config]


def test_tenants_do_not_see_each_other(saver: HybridSaver) -> None:
    one, two = saver.scoped("one"), saver.scoped("two")
    for number, view in enumerate((saver, one, two)):
        view.put(at("same"), empty_checkpoint(), {"step": number, "run_id": "r"}, {})
    for number, view in enumerate((saver, one, two)):
        (listed,) = view.list(None)
        assert listed.metadata["step"] == number
        assert listed.config["configurable"]["thread_id"] == "same"
    one.delete_for_runs(["r"])
    two.delete_thread("same")
    assert [len(list(view.list(None))) for view in (saver, one, two)] == [1, 0, 0]


def test_servers_that_are_not_there_are_named(postgres_url: str, redis_url: str) -> None:
    nowhere = HybridSaver.from_conn_string("postgresql://user:hidden@127.0.0.1:1/db")
    with pytest.raises(UnavailableError, match=r"Postgres at host '127.0.0.1', port '?1") as caught:
        nowhere.setup()
    assert "hidden" not in str(caught.value)
    nowhere.close()
    no_redis = HybridSaver.from_conn_string(postgres_url, redis="redis://:hidden@127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"Redis at 127\.0\.0\.1:1") as caught:
        no_redis.setup()
    assert "hidden" not in str(caught.value)
    no_redis.close()
    for postgres, url in (("not a conninfo", None), (postgres_url, "http://x")):
        with pytest.raises(ConfigurationError):
            HybridSaver.from_conn_string(postgres, redis=url)


@pytest.mark.parametrize(
    ("postgres", "url"),
    [
        ("mysql://u:SECRETPW@h/db", None),
        ("postgresql+psycopg://u:SECRETPW@h/db", None),
        ("postgresql://u:SECRET PW@h/db", None),
        ("postgresql://u:SECRETPW%zz@h/db", None),
        (None, None),
        ("", None),
        ("postgresql://h/db", "redis://u:SECRET/PW@h/0"),
        ("postgresql://h/db", "redis://u:SECRETPW@h:99999"),
        ("postgresql://h/db", "redis://u:SECRETPW@[bad"),
        ("postgresql://h/db", "redis://u:SECRETPW@h?bogus=1"),
        ("postgresql://h/db", "redis://:12?SECRET=PW@h"),
        ("postgresql://h/db", "redis://:12/SECRETPW@h"),
        ("postgresql://h/db", "redis://u/SECRETPW@h"),
    ],
)
def test_no_part_of_a_password_shows_in_a_traceback(postgres: Any, url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HybridSaver.from_conn_string(postgres, redis=url)
    told = [str(caught.value), str(caught.value.__cause__), str(caught.value.__context__)]
    assert "SECRET" not in "".join(told)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:SECRET/PW@127.0.0.1/db",
        "postgresql://user:hun@SECRET@127.0.0.1:1/db",
        "postgresql://user:12/SECRET@127.0.0.1/db",
        "postgresql://us/er:SECRET@127.0.0.1/db",
    ],
)
def test_a_password_that_ends_a_url_too_early_does_not_show(url: str) -> None:
    saver = HybridSaver.from_conn_string(url, timeout_s=2.0)
    with pytest.raises(UnavailableError, match="%2F") as caught:
        saver.setup()
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    saver.close()


async def test_a_password_that_ends_a_url_too_early_does_not_show_in_a_loop() -> None:
    saver = HybridSaver.from_conn_string("postgresql://user:hun@SECRET@127.0.0.1:1/db")
    with pytest.raises(UnavailableError, match="%2F") as caught:
        await saver.asetup()
    assert caught.value.__cause__ is caught.value.__context__ is None
    await saver.aclose()


def test_why_a_server_refused_is_the_cause() -> None:
    saver = HybridSaver.from_conn_string("postgresql://user@127.0.0.1:1/db", timeout_s=2.0)
    with pytest.raises(UnavailableError, match="no connection") as caught:
        saver.setup()
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    saver.close()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"bogus": 1}, "no setting is called.*bogus.*flush_every"),
        ({"index": 5}, "index must be a dict"),
        ({"ttl": 5}, "ttl must be a dict"),
        ({"ttl": {"default_ttl": "5"}}, "default_ttl must be a number of minutes"),
        ({"index": {"dims": 3}}, "index needs embed"),
        ({"index": {"dims": 3, "embed": 5}}, "index needs embed"),
        ({"index": {"dims": 3, "embed": "nobody:nothing"}}, "cannot be loaded"),
        ({"index": {"dims": True, "embed": len}}, "index needs dims"),
        ({"index": {"dims": 3, "embed": len, "fields": "text"}}, r"fields must be a list.*\['text"),
        ({"index": {"dims": 3, "embed": len, "fields": [1]}}, "fields must be a list"),
        ({"index": {"dims": 3, "embed": len, "ann_index_config": {"m": "x"}}}, "m of ann_index"),
        ({"index": {"dims": 3, "embed": len, "ann_index_config": 5}}, "ann_index_config must be"),
        ({"head_ttl_s": 10**17}, "head_ttl_s"),
        ({"timeout_s": 1e10}, "timeout_s"),
        ({"epoch_ttl_s": float("nan")}, "epoch_ttl_s"),
        ({"redis": "redis+cluster://h/3"}, "option 'db' of the Redis URL .* cannot be used"),
        ({"redis": "redis://h?bogus=1"}, "option 'bogus' of the Redis URL"),
        ({"redis": "redis://h?bogus=1&worse=2"}, "an option of the Redis URL"),
        ({"redis": "redis://h/abc"}, "number of a database"),
        ({"redis": "redis://h/-1"}, "number of a database"),
        ({"redis": "redis+sentinel://h/mine/abc"}, "number of a database"),
    ],
)
def test_what_cannot_work_is_refused_at_once(wrong: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Vat.connect("postgresql://h/db", **wrong)


def test_a_cluster_that_is_not_there_is_named(postgres_url: str) -> None:
    saver = HybridSaver.from_conn_string(postgres_url, redis="redis+cluster://:SECRET@127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"Redis at cluster 127") as caught:
        saver.setup()
    assert "SECRET" not in str(caught.value)
    saver.close()


def test_a_saver_without_keys_says_that_others_seal_here(postgres_url: str, caplog: Any) -> None:
    with HybridSaver.from_conn_string(postgres_url, keyring=Keyring.generate()) as sealed:
        sealed.put(at("t"), empty_checkpoint(), {}, {})
    assert not caplog.records
    with HybridSaver.from_conn_string(postgres_url):
        assert "sealed threads and this saver has no keyring" in caplog.text


def test_without_setup_the_remedy_is_named(postgres_url: str) -> None:
    saver = HybridSaver.from_conn_string(postgres_url)
    with pytest.raises(SchemaError, match="setup"):
        saver.put(at("t"), empty_checkpoint(), {}, {})
    saver.close()
    with pytest.raises(ConfigurationError, match="closed"):
        saver.get_tuple(at("t"))


def test_a_database_and_a_redis_belong_together(postgres_url: str, redis_url: str) -> None:
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url):
        pass
    alone = HybridSaver.from_conn_string(postgres_url)
    with pytest.raises(ConfigurationError, match="hot tier"):
        alone.setup()
    alone.close()


def test_sealed_and_unsealed_do_not_mix(postgres_url: str) -> None:
    old, new = Keyring.generate("old"), Keyring.generate("new")
    with HybridSaver.from_conn_string(postgres_url) as plain:
        plain.put(at("plain"), empty_checkpoint(), {}, {})
    with HybridSaver.from_conn_string(postgres_url, keyring=old) as sealed:
        sealed.put(at("sealed"), empty_checkpoint(), {}, {})
        with pytest.raises(SealError, match="without encryption"):
            sealed.get_tuple(at("plain"))
        sealed.delete_thread("plain")
        assert sealed.get_tuple(at("plain")) is None
    other = HybridSaver.from_conn_string(postgres_url, keyring=new)
    with other, pytest.raises(UnknownKeyError, match="'old'"):
        other.get_tuple(at("sealed"))
    again = HybridSaver.from_conn_string(postgres_url, keyring=Keyring.generate("old"))
    with again, pytest.raises(SealError, match="'old' is not the key that it was before"):
        again.get_tuple(at("sealed"))
    plain = HybridSaver.from_conn_string(postgres_url)
    with plain, pytest.raises(SealError, match="keyring"):
        plain.get_tuple(at("sealed"))


def test_a_redis_that_may_evict_journals_is_not_trusted(
    own_redis: Any, postgres_url: str, caplog: Any
) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    options: Any = {"redis": own_redis.url, "flush_every": 8, "flush_after": 60.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        saver.put(at("t"), empty_checkpoint(), {}, {})
        with psycopg.connect(postgres_url) as connection:
            assert connection.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
    assert "allkeys-lru" in caplog.text
