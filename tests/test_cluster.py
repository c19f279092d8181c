"""A Redis Cluster of three masters serves as the hot tier: all keys of a thread share a slot."""

import uuid

from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat.saver import HybridSaver


def test_steps_of_many_threads_go_through_every_master(postgres_url, redis_cluster_url):
    with HybridSaver.from_conn_string(
        postgres_url, redis=redis_cluster_url, flush_every=4
    ) as saver:
        for number in range(24):
            config = {
                "configurable": {"thread_id": f"{number}-{uuid.uuid4()}", "checkpoint_ns": ""}
            }
            for step in range(3):
                checkpoint = {**empty_checkpoint(), "channel_values": {"n": step}}
                checkpoint["channel_versions"] = {"n": saver.get_next_version(step, None)}
                new = checkpoint["channel_versions"]
                config = saver.put(config, checkpoint, {"source": "loop", "step": step}, new)
                saver.put_writes(config, [("n", step)], "task")
            latest = saver.get_tuple(
                {"configurable": {**config["configurable"], "checkpoint_id": ""}}
            )
            assert latest.checkpoint["channel_values"] == {"n": 2}
            assert [w[2] for w in latest.pending_writes] == [2]
        saver.flush()
        assert len(list(saver.list(None))) == 72
        assert saver.stats.hits >= 24
        assert saver.stats.degraded == 0
