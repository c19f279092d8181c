"""
Break each guarantee on purpose, and see a test notice.

Run ``python -m tests.mutations``. Each line of the table is one change to a
copy of the package and the tests that must fail for it. A change that no test
notices, or that no longer applies, is an error.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A guarantee, how to break it, and who must notice."""

    guarantee: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "what a socket does not take at once is sent while an answer is waited for",
        "_io/pool.py",
        "is_more = wanted == Wait.R and _has_more(pgconn)",
        "is_more = False",
        "test_connections.py::test_more_than_a_socket_takes_is_sent_before_an_answer_is_waited_for",
    ),
    Mutation(
        "an acknowledged step is kept by its writer as well",
        "_ops/hot.py",
        "            shared.copies.add(thread_id, entry)\n",
        "            pass\n",
        "test_protocol.py::test_redis_loses_its_memory_and_the_writers_copies_save_the_step",
    ),
    Mutation(
        "a flush writes the copies that Redis no longer has",
        "_ops/flush.py",
        "[e for _, e in self.journal] + [e for e in self.copies if e.uid not in present]",
        "[e for _, e in self.journal]",
        "test_protocol.py::test_redis_loses_its_memory_and_the_writers_copies_save_the_step",
    ),
    Mutation(
        "journal and head change before the flush that is due",
        "_ops/hot.py",
        "        is_due = steps >= every\n    else:",
        "        is_due = False\n        every = 2\n    else:",
        "test_vat.py::test_the_environment_says_where",
    ),
    Mutation(
        "an entry of another generation is discarded",
        "_ops/flush.py",
        "return fence is not None and entry.fence.generation == fence.generation",
        "return True",
        "test_protocol.py::test_copies_and_journals_of_a_deleted_thread_stay_away",
    ),
    Mutation(
        "what was pruned stays away from older copies",
        "_ops/flush.py",
        "return is_older and floor is not None and entry.checkpoint_id < floor",
        "return False",
        "test_protocol.py::test_pruned_rows_stay_away_from_older_copies",
    ),
    Mutation(
        "deleted runs stay away from older copies",
        "_ops/flush.py",
        "    if entry.run_id in checks.runs:\n        return True\n",
        "",
        "test_protocol.py::test_deleted_runs_stay_away_from_older_copies",
    ),
    Mutation(
        "a late child of a deleted thread is refused",
        "_ops/hot.py",
        "            await _require_parent(shared, backend, new)\n",
        "",
        "test_protocol.py::test_a_late_child_is_refused_though_a_late_write_came_first",
    ),
    Mutation(
        "a delete closes the thread in Redis",
        "_hot/scripts/close.lua",
        "redis.call('HSET', KEYS[1], 'f', 'closing:' .. ARGV[1])\n",
        "",
        "test_protocol.py::test_a_delete_takes_no_step_in_between",
    ),
    Mutation(
        "a slow fill sets nothing back",
        "_hot/scripts/fill.lua",
        "if state[1] ~= ARGV[1] then return {'refused'} end\n",
        "",
        "test_protocol.py::test_a_slow_fill_does_not_set_the_head_back",
    ),
    Mutation(
        "a missing head on a dirty thread is not answered from Postgres alone",
        "_ops/threads.py",
        "    if ticket is None:\n        await flush(shared, backend, [thread_id])\n    return",
        "    return",
        "test_protocol.py::test_the_head_is_missing_before_every_read",
    ),
    Mutation(
        "a head whose parts do not belong together is not served",
        "_ops/hot.py",
        "    if len(found) < len(versions):\n        return None\n",
        "",
        "test_protocol.py::test_a_torn_head_is_not_served",
    ),
    Mutation(
        "a delta extends the head it was made from, and no other",
        "_hot/scripts/put.lua",
        "    if current ~= parent or state[3] then return {'whole'} end\n",
        "",
        "test_protocol.py::test_a_late_child_is_refused_though_a_late_write_came_first",
    ),
    Mutation(
        "a delta finds the values that it relies on in the head",
        "_hot/scripts/put.lua",
        "      if redis.call('HGET', head, ARGV[at]) ~= ARGV[at + 1] then\n",
        "      if at >= marks and redis.call('HGET', head, ARGV[at]) ~= ARGV[at + 1] then\n",
        "test_protocol.py test_saver_model.py test_graphs.py",
    ),
    Mutation(
        "a thread opened in an earlier epoch is opened again before it takes a write",
        "_hot/scripts/_common.lua",
        "  if state[2] ~= epoch then return {'open'} end\n",
        "",
        "test_protocol.py::test_a_late_write_is_refused_though_redis_heard_nothing_of_the_deletion",
    ),
    Mutation(
        "however many write past Redis, it is trusted again",
        "_ops/tiers.py",
        "(sql.STATE_LOCK_TIMEOUT)\n        await session.execute(sql.LOCK_STATE)\n",
        "(sql.STATE_LOCK_TIMEOUT)\n",
        "test_protocol.py::test_however_many_write_past_redis_it_is_trusted_again",
    ),
    Mutation(
        "who waits to end an epoch keeps nobody waiting for long",
        "_ops/tiers.py",
        "        await session.execute(sql.STATE_LOCK_TIMEOUT)\n",
        "",
        "test_protocol.py::test_who_holds_the_state_and_is_frozen_keeps_nobody_from_writing",
    ),
    Mutation(
        "a thread without a journal is not dirty for ever",
        "_ops/flush.py",
        "    if batch.journal and not done:\n",
        "    if not done:\n",
        "test_protocol.py::test_a_thread_whose_journal_was_evicted_is_not_dirty_for_ever",
    ),
    Mutation(
        "what was copied to another saver is compared with its source",
        "migrate.py",
        "        await _verify(source, target, thread_id, thread)\n",
        "",
        "test_migrate.py::test_what_does_not_come_back_equal_is_told",
    ),
    Mutation(
        "a copied child comes after its parent, whatever their ids",
        "migrate.py",
        "        ordered.update(dict.fromkeys(reversed(line)))\n",
        "        ordered.update(dict.fromkeys(line))\n",
        "test_migrate.py::test_a_child_with_a_smaller_id_than_its_parent_comes_after_it",
    ),
    Mutation(
        "a thread that is begun anew while what it left is discarded loses nothing",
        "_ops/flush.py",
        "        born.update(await _existing(session, [t for t in mine if t not in fences]))\n",
        "",
        "test_protocol.py::test_what_a_thread_begins_with_is_not_taken_for_what_a_deleted_one_left",
    ),
    Mutation(
        "nobody waits for a parent that was deleted with its run",
        "_ops/flush.py",
        "(entry.fence.history >= history and ",
        "(entry and ",
        "test_protocol.py::test_runs_that_another_process_deleted_keep_nobody_waiting",
    ),
    Mutation(
        "what was sent before version 4 is opened where it was sealed",
        "_ops/values.py",
        ".load_write(parent_id, write) for",
        ".load_write(snapshot.checkpoint_id, write) for",
        "test_compatibility.py::test_what_old_checkpoints_sent_is_opened_where_it_is_sealed",
    ),
    Mutation(
        "no more than flush_every - 1 super-steps wait, whoever else flushes",
        "_hot/scripts/trim.lua",
        "then steps = steps + found end",
        "then steps = steps + 1 end",
        "test_protocol.py::test_a_flush_that_comes_late_does_not_put_off_the_next",
    ),
    Mutation(
        "what kept values build on is kept",
        "_durable/checkpoints.py",
        "    UNION\n"
        "    SELECT k.checkpoint_ns, k.channel, unnest(k.vat_bases) FROM checkpoint_blobs k\n"
        "    JOIN named USING (checkpoint_ns, channel, version) WHERE k.thread_id = %(thread)s\n",
        "",
        "test_compact.py::test_what_kept_checkpoints_build_on_stays",
    ),
    Mutation(
        "what kept writes build on is kept",
        "_durable/checkpoints.py",
        "    UNION\n"
        "    SELECT w.checkpoint_ns, w.channel, unnest(w.vat_bases) FROM checkpoint_writes w\n"
        "    WHERE w.thread_id = %(thread)s\n",
        "",
        "test_compact.py::test_what_writes_build_on_stays_when_their_values_go",
    ),
    Mutation(
        "a version that is stored is not packed again, perhaps on itself",
        "_ops/compact.py",
        "if stored.value(key) == new[key]}",
        "if False}",
        "test_compact.py::test_a_flush_that_comes_twice_changes_nothing",
    ),
    Mutation(
        "nothing builds on a version that gets another value",
        "_ops/compact.py",
        "        await make_whole(session, codecs[key[0]], key)\n",
        "",
        "test_compact.py::test_a_version_that_is_used_again_takes_nothing_with_it",
    ),
    Mutation(
        "what a patch gives is compared with its digest",
        "_durable/packing.py",
        "if not is_base and digest != _digest(value):",
        "if False:",
        "test_compact.py::test_a_damaged_patch_or_another_base_is_refused",
    ),
    Mutation(
        "a value that cannot be packed is stored all the same",
        "_ops/compact.py",
        "        except SealError:\n            return None\n\n    def base",
        "        except ZeroDivisionError:\n            return None\n\n    def base",
        "test_compact.py::test_what_builds_on_a_changed_value_is_refused",
    ),
    Mutation(
        "a Redis that restarted or failed over is noticed",
        "_ops/tiers.py",
        "(found is None or runs != hot_runs)",
        "found is None",
        "test_protocol.py::test_a_redis_that_went_back_in_time_is_not_believed",
    ),
    Mutation(
        "a Redis that was emptied is noticed",
        "_ops/tiers.py",
        "(found is None or runs != hot_runs)",
        "runs != hot_runs",
        "test_protocol.py::test_an_emptied_redis_is_passed_by_until_the_writers_have_flushed",
    ),
    Mutation(
        "nobody writes past a Redis that is trusted again",
        "_ops/tiers.py",
        "return bool(rows) and rows[0][0] == shared.state.epoch",
        "return True",
        "test_protocol.py::test_nobody_goes_past_a_redis_that_is_trusted_again",
    ),
    Mutation(
        "heads that own copies have overtaken are voided",
        "_ops/flush.py",
        "        await hot.script(scripts.VOID, [shared.keys.meta(batch.thread_id), *heads], [])\n",
        "        pass\n",
        "test_protocol.py::test_a_writer_that_slept_through_a_loss_overtakes_no_head_unseen",
    ),
    Mutation(
        "a head is not voided for what another flush took out of the journal",
        "_ops/flush.py",
        "    left = [entry for entry in shared.copies.of(thread_id) if entry.uid in own]\n",
        "    left = list(own.values())\n",
        "test_protocol.py::test_a_flush_that_read_the_copies_before_another_dropped_them",
    ),
    Mutation(
        "copies are dropped before the journal is trimmed",
        "_ops/flush.py",
        "    _drop(shared, batch)\n    if hot is not None:\n"
        "        await _trim(shared, hot, batch)\n",
        "    if hot is not None:\n        await _trim(shared, hot, batch)\n"
        "    _drop(shared, batch)\n",
        "test_protocol.py::test_a_flush_beside_another_takes_nothing_for_lost",
    ),
    Mutation(
        "a head takes a patch only of the value that it holds",
        "_hot/scripts/put.lua",
        "        return {at < marks and 'whole' or 'base'}\n",
        "        if at < marks then return {'whole'} end\n",
        "test_patches.py::test_who_does_not_know_what_the_head_holds_sends_it_whole",
    ),
    Mutation(
        "a patch in the journal waits for its base",
        "_ops/patches.py",
        '            needs = needs if one else (*needs, (blob.channel, ""))\n',
        "",
        "test_patches.py::test_a_patch_is_not_stored_without_its_base",
    ),
    Mutation(
        "a patch builds on what was in the journal before it",
        "_ops/patches.py",
        "            self._values[key] = data\n            return blob\n",
        "            return blob\n",
        "test_patches.py::test_whoever_flushes_a_dead_writers_journal_has_the_values",
    ),
    Mutation(
        "who has not the key leaves patches in the journal",
        "_ops/flush.py",
        "len(batch.held) + batch.unread for",
        "len(batch.held) for",
        "test_patches.py::test_without_the_key_a_journal_is_left_to_those_who_have_it",
    ),
    Mutation(
        "an older patch does not count for what was stored whole since",
        "_hot/entries.py",
        'leads_to == version and found.get(b"m:" + channel.encode(), mark) == mark\n',
        "leads_to == version\n",
        "test_patches.py::test_a_version_that_was_sent_as_a_patch_may_be_used_again",
    ),
    Mutation(
        "a value that the head did not take is not built on",
        "_ops/hot.py",
        '        if reply[0] == b"ok" and reply[3]:\n',
        '        if reply[0] == b"ok":\n',
        "test_patches.py::test_a_value_that_no_head_took_is_not_built_on",
    ),
    Mutation(
        "data keys are rotated where they belong",
        "_ops/rotate.py",
        "        except SealError:\n            left += 1\n",
        "        except ZeroDivisionError:\n            left += 1\n",
        "test_rotation.py::test_a_wrapped_key_of_another_thread_is_not_rotated_into_use",
    ),
    Mutation(
        "what Redis holds is believed by its sum",
        "_hot/entries.py",
        "    if summed[:_SUM_BYTES] != _sum(data, *place):\n",
        "    if False:\n",
        "test_damage.py::test_no_field_of_a_head_can_be_damaged_or_lost",
    ),
    Mutation(
        "a head that lost a field is not believed",
        "_hot/entries.py",
        '        is_whole = int(self._fields[b"h"]) == len(self._fields) - 1\n',
        "        is_whole = True\n",
        "test_damage.py::test_no_field_of_a_head_can_be_damaged_or_lost",
    ),
    Mutation(
        "nor after it went on",
        "_hot/scripts/put_writes.lua",
        "  count(head, added)\n",
        "  redis.call('HSET', head, 'h', redis.call('HLEN', head) - 1)\n",
        "test_damage.py::test_what_a_head_lost_is_missed_after_it_went_on",
    ),
    Mutation(
        "nor a checkpoint of an earlier life",
        "_hot/entries.py",
        '    return [b"c", *(one.encode() for one in where)]\n',
        '    return [b"c", *(one.encode() for one in where[1:])]\n',
        "test_damage.py::test_the_checkpoint_of_an_earlier_life_is_not_believed",
    ),
    Mutation(
        "nor one of another shape",
        "_ops/hot.py",
        "    except DAMAGES:\n        return None\n",
        "    except ZeroDivisionError:\n        return None\n",
        "test_damage.py::test_a_head_of_another_shape_is_read_from_postgres",
    ),
    Mutation(
        "an entry of the journal is believed by its sum",
        "_hot/entries.py",
        '    if found[b"h"] != _sum(ormsgpack.packb(others)):\n',
        "    if False:\n",
        "test_damage.py::test_no_field_of_an_entry_can_be_damaged_or_lost",
    ),
    Mutation(
        "no step builds on a head that lost a field",
        "_hot/scripts/put.lua",
        "  if not (state[4] or is_whole(head, state[5])) then return {'open'} end\n",
        "",
        "test_damage.py::test_no_step_builds_on_a_head_that_lost_a_field",
    ),
    Mutation(
        "nor on one whose id is damaged",
        "_hot/scripts/_common.lua",
        "  return table.concat({fence, epoch, id or '', head}, '@')\n",
        "  return table.concat({fence, epoch, head}, '@')\n",
        "test_damage.py::test_no_step_builds_on_a_damaged_head",
    ),
    Mutation(
        "a key of another type is taken away",
        "_hot/scripts/_common.lua",
        "  if found ~= kind and found ~= 'none' then redis.call('DEL', key) end\n",
        "",
        "test_damage.py::test_a_key_of_another_type_is_none_of_ours",
    ),
    Mutation(
        "a field of another kind is damage",
        "_hot/entries.py",
        " or any(field[:2] not in _KINDS for field in self._fields):\n",
        ":\n",
        "test_damage.py::test_a_field_under_another_name_is_noticed",
    ),
    Mutation(
        "what another process flushed is not stored again",
        "_ops/flush.py",
        "        shared.copies.drop(thread_id, flushed)\n",
        "        pass\n",
        "test_protocol.py::test_what_another_process_flushed_is_not_stored_again",
    ),
    Mutation(
        "a saver without a keyring takes no sealed thread for a plain one",
        "_ops/hot.py",
        " and snapshot is not None and not is_sealed(snapshot.exact_type):\n",
        ":\n",
        "test_patches.py::test_a_stranger_who_was_refused_still_spoils_nothing",
    ),
    Mutation(
        "a quarantine ends with its cause",
        "_ops/hot.py",
        "await flush(shared, backend, [thread_id])\n    except QuarantinedError as error:",
        "raise QuarantinedError\n    except QuarantinedError as error:",
        "test_damage.py::test_a_quarantine_ends_with_its_cause",
    ),
    Mutation(
        "a new data key is learnt with the fence",
        "_ops/shared.py",
        "    if known is not None and known.fence == fence:\n",
        "    if known is not None and known.fence.generation == fence.generation:\n",
        "test_reseal.py::test_a_process_that_only_flushes_others_seals_with_the_new_key",
    ),
    Mutation(
        "a replaced data key stays while a row needs it",
        "_ops/reseal.py",
        "        is_dropped = not any([",
        "        is_dropped = any([True]) or not any([",
        "test_reseal.py::test_a_row_that_does_not_open_keeps_the_old_key",
    ),
    Mutation(
        "what is shredded is not opened with a key that is remembered",
        "_ops/history.py",
        "    known = shared.threads.get(thread_id) if shared.keyring is None else None\n",
        "    known = shared.threads.get(thread_id)\n",
        "test_reseal.py::test_what_is_shredded_nobody_reads",
    ),
    Mutation(
        "a store asks for its keys again",
        "_ops/items.py",
        "    since = now() - _KEY_S\n",
        "    since = float('-inf')\n",
        "test_reseal.py::test_a_root_of_a_store_is_shredded",
    ),
    Mutation(
        "a fence that is only in Redis is put right",
        "_ops/hot.py",
        '        elif answer in (b"open", b"stale"):\n',
        '        elif answer in (b"open",):\n',
        "test_damage.py::test_no_field_of_a_heads_place_can_be_damaged",
    ),
    Mutation(
        "a patch says where else than at its begin a value is another",
        "_durable/packing.py",
        "        if not between:\n            break\n",
        "        break\n",
        "test_compact.py::test_large_values_that_grow_cost_what_they_grow_by",
    ),
    Mutation(
        "a child is never stored before its parent",
        "_ops/flush.py",
        "_is_orphan(thread_id, entry, checks, here))\n",
        "False)\n",
        "test_protocol.py::test_a_child_waits_for_a_parent_that_only_its_writer_still_has",
    ),
    Mutation(
        "of special writes the last one taken stays",
        "_durable/checkpoints.py",
        "WHERE w.vat_epoch IS NULL OR w.vat_epoch <= excluded.vat_epoch\n",
        "",
        "test_protocol.py::test_a_journal_from_before_redis_failed_undoes_no_later_write",
    ),
    Mutation(
        "a failing Redis is passed by",
        "_ops/hot.py",
        '        await degrade(shared, backend)\n        answer = b"degraded"\n',
        "        raise\n",
        "test_protocol.py::test_redis_goes_and_comes_back",
    ),
    Mutation(
        "the backlog is bounded",
        "_ops/hot.py",
        "    while full := _full(shared, thread_id):",
        "    while full := None:",
        "test_protocol.py::test_a_full_backlog_refuses_the_next_step_and_keeps_the_others",
    ),
    Mutation(
        "with flush_every=1 nothing is acknowledged that Postgres does not have",
        "_ops/hot.py",
        "        if every == 1:\n            raise\n",
        "        pass\n",
        "test_protocol.py::test_a_step_that_must_be_durable_is_not_acknowledged_before",
    ),
    Mutation(
        "where forks are refused, the second run is",
        "_hot/scripts/put.lua",
        "return {'conflict'}",
        "",
        "test_protocol.py::test_the_second_of_two_runs_is_refused_where_forks_are",
    ),
    Mutation(
        "where forks are refused, the second run is, also past Redis",
        "_ops/flush.py",
        "return newest not in (entry.parent_id, entry.checkpoint_id)",
        "return False",
        "test_protocol.py::test_the_second_of_two_runs_is_refused_where_forks_are",
    ),
    Mutation(
        "a killed connection is replaced before anybody notices",
        "_io/blocking.py",
        "                if not is_repeatable(error):\n                    raise\n",
        "                raise\n",
        "test_peer_bugs.py::test_killed_connections_are_replaced_before_anybody_notices",
    ),
    Mutation(
        "a frozen process holds no lock for ever",
        "_io/blocking.py",
        "                await session.execute(self._pool.address.transaction)\n",
        "",
        "test_protocol.py::test_a_frozen_process_holds_no_thread_for_ever --timeout=40",
    ),
    Mutation(
        "an answer of Redis that took longer than a lease is not believed",
        "_ops/tiers.py",
        "    return await _hot(shared, backend, ttl_s) is not None and shared.epoch == epoch\n",
        "    return True\n",
        "test_protocol.py::test_an_answer_that_took_longer_than_a_lease_is_not_believed",
    ),
    Mutation(
        "no head of a Redis that took another's place is served",
        "_hot/scripts/get.lua",
        "if not ARGV[3]:find(run, 1, true) then return {'replaced'} end\n",
        "",
        "test_protocol.py::test_no_head_of_a_redis_in_the_place_of_another_is_served",
    ),
    Mutation(
        "a fill counts in the epoch in which it began",
        "_ops/threads.py",
        "            epoch,\n            shared.settings.head_ttl_s,",
        "            shared.epoch,\n            shared.settings.head_ttl_s,",
        "test_protocol.py::test_a_fill_counts_in_the_epoch_in_which_it_began",
    ),
    Mutation(
        "no process believes a head that is older than its own step",
        "_ops/hot.py",
        "    if _is_behind(shared, thread_id, checkpoint_ns, newest):\n",
        "    if False:\n",
        "test_protocol.py::test_no_process_believes_a_head_that_is_older_than_its_own_step",
    ),
    Mutation(
        "a head from before an epoch stays away whatever else is opened",
        "_hot/scripts/_common.lua",
        "return table.concat({fence, epoch, id or '', head}, '@')",
        "return table.concat({fence, id or '', head}, '@')",
        "test_protocol.py::test_a_head_from_before_an_epoch_stays_away_whatever_else_is_opened",
    ),
    Mutation(
        "whoever goes past Redis waits for the longest lease of any process",
        "_ops/tiers.py",
        "state.obeyed_at = known_at + state.lease_s",
        "state.obeyed_at = known_at + shared.settings.epoch_ttl_s",
        "test_protocol.py::test_whoever_goes_past_redis_waits_for_the_longest_lease",
    ),
    Mutation(
        "no caller waits for a Redis that failed",
        "_ops/tiers.py",
        "if left_s is None or (left_s <= 0 and may_try):",
        "if left_s is None or left_s <= 0:",
        "test_protocol.py::test_no_caller_waits_for_a_redis_that_failed",
    ),
    Mutation(
        "no put waits for a Postgres that failed",
        "_ops/hot.py",
        "(shared.is_durable_away or not is_due)",
        "not is_due",
        "test_protocol.py::test_no_put_waits_for_a_postgres_that_failed",
    ),
    Mutation(
        "each statement reads what was committed before it, whatever the database's default is",
        "_io/addresses.py",
        r'''isolation = r"-c default_transaction_isolation=read\ committed"''',
        'isolation = ""',
        "test_connections.py -kisolation",
    ),
    Mutation(
        "a thread that was left closed is opened though nobody comes by",
        "_lifecycle.py",
        "    await reopen_abandoned(shared, backend, threads)\n",
        "",
        "test_protocol.py::test_a_thread_left_closed_is_opened_though_nobody_comes_by",
    ),
    Mutation(
        "after a cut connection to Redis the very next call succeeds, without going past it",
        "_io/addresses.py",
        "Retry(NoBackoff(), 1,",
        "Retry(NoBackoff(), 0,",
        "test_connections.py -kbroken",
    ),
    Mutation(
        "after a killed backend the very next call succeeds",
        "_io/blocking.py",
        "                if not is_repeatable(error):\n                    raise\n",
        "                raise\n",
        "test_connections.py -kbroken",
    ),
    Mutation(
        "behind a pooler no statement and no setting outlives its transaction",
        "_io/addresses.py",
        "self._is_pooled = told != real",
        "self._is_pooled = False",
        "test_connections.py -kpooler",
    ),
    Mutation(
        "a primary that became a standby is left",
        "_io/mapping.py",
        "    psycopg.errors.ReadOnlySqlTransaction,\n)\n\n\ndef",
        ")\n\n\ndef",
        "test_failover.py::test_a_primary_that_became_a_standby_is_left",
    ),
    Mutation(
        "closing flushes",
        "_lifecycle.py",
        "        if waiting:\n            self._flush_last(waiting)\n",
        "",
        "test_vat.py::test_closing_flushes",
    ),
    Mutation(
        "what is acknowledged while another thread closes is committed",
        "_ops/shared.py",
        "must_be_durable = self.may_evict_journals or self.is_closing",
        "must_be_durable = self.may_evict_journals",
        "test_vat.py::test_a_step_under_way_while_another_thread_closes_is_committed",
    ),
    Mutation(
        "the cut-over waits for what strangers have under way",
        "_ops/tiers.py",
        "        await session.execute(sql.LOCK_TABLES)\n",
        "",
        "test_enable_hot.py::test_the_cut_over_waits_for_what_others_have_under_way",
    ),
    Mutation(
        "a database that others wrote is not made hot unasked",
        "_durable/checkpoints.py",
        "WHERE hot_tier IS NULL AND (%(is_asked)s OR NOT (",
        "WHERE hot_tier IS NULL AND (%(is_asked)s OR true OR NOT (",
        "test_enable_hot.py::test_a_database_that_others_wrote_is_not_made_hot_unasked",
    ),
    Mutation(
        "after the cut-over strangers are refused",
        "_durable/schema.py",
        "    IF is_hot THEN\n",
        "    IF false THEN\n",
        "test_enable_hot.py::test_after_the_cut_over_others_are_refused_with_the_reason",
    ),
    Mutation(
        "all processes of a database use one prefix",
        "_ops/tiers.py",
        "    if hot_prefix not in (None, shared.settings.key_prefix):\n        raise _other_prefix"
        "(hot_prefix)\n    _learn",
        "    _learn",
        "test_schema.py::test_all_processes_of_a_database_use_one_prefix",
    ),
    Mutation(
        "a schema without tables does not lead to another's",
        "_io/connections.py",
        "        if self.schema is None or needs <= self._found:",
        "        if True:",
        "test_schema.py::test_a_schema_without_tables_does_not_lead_to_anothers",
    ),
    Mutation(
        "what a rule of the database refuses holds up no other thread",
        "_ops/flush.py",
        "        except (RefusedError, SchemaError):\n            for thread_id in some:",
        "        except (RefusedError, SchemaError):\n            for thread_id in ():",
        "test_schema.py::test_what_a_rule_of_the_database_refuses_holds_up_no_other_thread",
    ),
    Mutation(
        "a sweep asks again under the lock, after a flush",
        "_ops/sweep.py",
        "[due for due in map(_Due._make, rows) if due.is_deletion]",
        "[due for due in batch if due.thread_id in stored]",
        "test_threads.py::test_a_thread_whose_newest_step_is_in_redis_only_is_left_alone",
    ),
    Mutation(
        "a prune asks again under the lock, after a flush",
        "_ops/sweep.py",
        "    if not rows or _Due(*rows[0])[:4] != due[:4]:\n        raise _LeftAloneError\n",
        "",
        "test_threads.py::test_a_thread_whose_newest_step_is_in_redis_only_is_left_alone",
    ),
    Mutation(
        "a sweep leaves a thread alone that has steps which Postgres refuses",
        "_ops/sweep.py",
        "[one for one in threads if one not in shared.quarantine]",
        "list(threads)",
        "test_threads.py::test_steps_that_postgres_refuses_are_not_swept_away_and_stop_no_sweep",
    ),
    Mutation(
        "what others build on stays whole when it is rewritten",
        "_ops/compact.py",
        "        if key in bases:\n            line.versions = []\n",
        "",
        "test_rewrite.py::test_what_others_build_on_stays_whole",
    ),
    Mutation(
        "reading a checkpoint costs the same however long its thread is",
        "_durable/checkpoints.py",
        "version = v.value LIMIT 1\n        ) AS b\n    ),",
        "version = v.value\n        ) AS b\n    ),",
        "test_plans.py::test_as_few_rows_are_looked_at_as_are_wanted",
    ),
    Mutation(
        "who wraps data keys is asked once for each",
        "_ops/keys.py",
        "        opened.set(wrapped, place, data_key)\n",
        "",
        "test_kms.py::test_it_is_asked_once_for_each_data_key",
    ),
    Mutation(
        "who waits for a KMS keeps nobody else waiting",
        "_io/asyncio.py",
        "        return await asyncio.to_thread(work)\n\n    async def embed",
        "        return work()\n\n    async def embed",
        "test_kms.py::test_who_waits_for_it_keeps_nobody_else_waiting",
    ),
    Mutation(
        "a KMS that is away holds up no flush",
        "_ops/shared.py",
        "    except (SealError, UnavailableError, ConfigurationError):\n",
        "    except (SealError, ConfigurationError):\n",
        "test_kms.py::test_a_process_that_cannot_reach_it_flushes_what_others_left",
    ),
    Mutation(
        "a KMS is asked to use no key that only the database names",
        "kms.py",
        "        self._refuse_strange(arn)\n",
        "",
        "test_kms.py::test_a_key_of_kms_that_somebody_wrote_into_the_database_is_not_used",
    ),
    Mutation(
        "a KMS that used another key is not believed",
        "kms.py",
        '        if found["KeyId"] != arn:\n',
        "        if False:\n",
        "test_kms.py::test_an_answer_of_another_key_of_kms_is_not_believed",
    ),
    Mutation(
        "a KMS is asked which key an alias names no more than once a second",
        "kms.py",
        "        if time.monotonic() < sure_until:\n            return arn\n",
        "",
        "test_kms.py::test_of_an_alias_kms_is_asked_seldom_and_again",
    ),
    Mutation(
        "a KMS is asked again which key an alias names",
        "kms.py",
        "time.monotonic() + _ALIAS_S if is_alias else inf",
        "inf",
        "test_kms.py::test_of_an_alias_kms_is_asked_seldom_and_again",
    ),
    Mutation(
        "a KMS that denies one ciphertext keeps no others from being rotated",
        "kms.py",
        "        with suppress(ConfigurationError):\n            return self._decrypted",
        "        if True:\n            return self._decrypted",
        "test_kms.py::test_a_ciphertext_that_kms_denies_keeps_no_others_from_being_rotated",
    ),
    Mutation(
        "a KMS that denies everything is not taken for one that is busy",
        "kms.py",
        "    return code, code in _BUSY or status >= 500  # noqa: PLR2004",
        "    return code, code not in _CHANGED | _NOT_TO_BE_HAD",
        "test_kms.py::test_what_aws_kms_answers_is_an_error_of_ours",
    ),
    Mutation(
        "a process that a KMS denies holds up no flush",
        "_ops/shared.py",
        "    except (SealError, UnavailableError, ConfigurationError):\n",
        "    except (SealError, UnavailableError):\n",
        "test_kms.py::test_a_process_that_cannot_reach_it_flushes_what_others_left",
    ),
    Mutation(
        "nothing is sent to who took the key server's place",
        "kms.py",
        "            self._refuse_strangers(connection)\n",
        "",
        "test_kms.py::test_who_took_the_servers_place_is_told_no_secret",
    ),
    Mutation(
        "a key server's memory is its own",
        "_key_server.py",
        "    _hide_memory()  # before there is a key in it\n",
        "",
        "test_kms.py::test_no_other_process_of_its_user_reads_a_key_servers_memory",
    ),
    Mutation(
        "a key server makes no socket where others could replace it",
        "_key_server.py",
        "        _refuse_open_directory(path)\n",
        "",
        "test_kms.py::test_where_a_key_server_makes_no_socket_it_says_why",
    ),
    Mutation(
        "a key server takes with it no socket but its own",
        "_key_server.py",
        "            if _inode(path) == self._made:\n",
        "            if True:\n",
        "test_kms.py::test_a_key_server_takes_with_it_no_socket_but_its_own",
    ),
    Mutation(
        "a key server's queue has room for hundreds",
        "_key_server.py",
        "    request_queue_size = 1024",
        "    request_queue_size = 5",
        "test_kms.py::test_many_may_ask_a_key_server_at_once",
    ),
    Mutation(
        "a key server that is busy or started anew is asked again",
        "kms.py",
        "_PASSING = (BlockingIOError, ConnectionError, FileNotFoundError)",
        "_PASSING = ()",
        "test_kms.py::test_a_key_server_that_is_started_anew_is_asked_again",
    ),
    Mutation(
        "a key server's threads are bounded",
        "_key_server.py",
        "_MOST_AT_ONCE = 128",
        "_MOST_AT_ONCE = 1000",
        "test_kms.py::test_slow_clients_take_no_more_than_their_time_and_their_places",
    ),
    Mutation(
        "a slow client of a key server has one deadline",
        "_key_server.py",
        "        connection.settimeout(left(deadline))\n        part =",
        "        part =",
        "test_kms.py::test_slow_clients_take_no_more_than_their_time_and_their_places --timeout=60",
    ),
    Mutation(
        "a keyring is saved whole or not",
        "keyring.py",
        "            Path(beside).unlink()\n        try:",
        "            pass\n        try:",
        "test_keyring.py::test_of_a_keyring_that_cannot_be_written_nothing_is_left",
    ),
    Mutation(
        "a keyring is on disk before it has its name",
        "keyring.py",
        "                os.fsync(file.fileno())\n",
        "",
        "test_keyring.py::test_a_keyring_has_its_name_once_it_is_on_disk",
    ),
    Mutation(
        "a key id that is misspelt makes no new key",
        "keyring.py",
        "        self._refuse_missing(key_id)\n        rest",
        "        if key_id not in self._keys:\n            return self\n        rest",
        "test_keyring.py::test_a_primary_key_that_is_not_there_is_a_mistake_and_no_new_key",
    ),
    Mutation(
        "the text of a key is in no error's context",
        "keyring.py",
        "    except ValueError:\n        return None\n",
        "    except ValueError:\n        raise ConfigurationError(\"'k1': no base64\") from None\n",
        "test_keyring.py::test_an_unusable_key_is_named_and_not_shown",
    ),
    Mutation(
        "a keyring's mistake shows no other keys",
        "keyring.py",
        "            del keys\n            raise error.with_traceback(None) from None",
        "            raise",
        "test_keyring.py::test_a_mistake_shows_no_key_even_with_the_variables_of_its_frames",
    ),
    Mutation(
        "a value that is labelled with another cipher is refused",
        "_seal/codec.py",
        "    if not suffix or not type_.endswith(suffix):\n",
        "    suffix = '+' + type_.rpartition('+')[2]\n    if False:\n",
        "test_reseal.py::test_a_value_that_is_labelled_with_another_cipher_is_refused",
    ),
    Mutation(
        "nothing is made of what is stored but types that are allowed",
        "_seal/strict.py",
        "        if not is_allowed:\n            raise self._errors",
        "        if False:\n            raise self._errors",
        "test_strict.py::test_what_somebody_put_into_the_database_is_not_run",
    ),
    Mutation(
        "what could not be read again is not written",
        "_seal/strict.py",
        "        if writing.new:\n",
        "        if False:\n",
        "test_strict.py::test_a_type_that_is_not_allowed_is_refused_before_anything_is_written",
    ),
    Mutation(
        "at any depth",
        "_seal/strict.py",
        "            self._walk(*found[0])\n",
        "",
        "test_strict.py::test_at_any_depth_what_could_not_be_read_is_not_written",
    ),
    Mutation(
        "what would come back as something else is not written",
        "_seal/strict.py",
        "            if isinstance(kind, type) and type(made) is not kind:\n",
        "            if False:\n",
        "test_strict.py::test_what_would_come_back_as_something_else_is_not_written",
    ),
    Mutation(
        "of older JSON only messages are made",
        "_seal/strict.py",
        '        if value["type"] != "constructor" or not is_allowed:\n',
        "        if False:\n",
        "test_strict.py::test_of_older_json_only_messages_are_made",
    ),
    Mutation(
        "what a store acknowledges is sealed by a key that is still there",
        "_ops/items.py",
        "    await _open_keys(items, backend.durable, backend, roots, roots)\n",
        "    await _open_keys(items, backend.durable, backend, roots)\n",
        "test_reseal.py::test_a_root_of_a_store_is_shredded",
    ),
    Mutation(
        "a filter finds what was written before its field was declared",
        "_durable/blind.py",
        "    parts += [_part(number, field) for number, field in enumerate(fields)]\n",
        "",
        "test_blind_index.py::test_a_list_finds_what_in_memory_saver_finds",
    ),
    Mutation(
        "a token of one tenant says nothing about another's",
        "_ops/shared.py",
        'tokens(metadata, wanted, "checkpoint", tenant)',
        'tokens(metadata, wanted, "checkpoint", "")',
        "test_blind_index.py::test_tokens_of_tenants_cannot_be_compared",
    ),
    Mutation(
        "what is filtered by a token is not opened in vain",
        "_ops/search.py",
        "{BLIND: {key: token}}",
        "{}",
        "test_blind_index.py::test_other_items_are_not_opened",
    ),
    Mutation(
        "few rows are looked at for a token",
        "_durable/blind.py",
        '_contains(f"filter_{number}")',
        "sql.SQL('c.metadata || %(filter_0)s::jsonb || %(filter_1)s::jsonb @> {}::jsonb').format("
        "sql.Placeholder(f'filter_{number}'))",
        "test_plans.py::test_as_few_rows_are_looked_at_as_are_wanted",
    ),
    Mutation(
        "what is shredded loses its tokens",
        "_durable/checkpoints.py",
        "WHERE c.thread_id = %(thread)s AND jsonb_typeof(c.metadata -> 'vat_blind') = 'object'",
        "WHERE false AND c.thread_id = %(thread)s",
        "test_blind_index.py::test_shredding_destroys_tokens",
    ),
    Mutation(
        "a time until when plaintext is accepted ends",
        "settings.py",
        "_now() < self.accept_plaintext",
        "True",
        "test_plaintext.py::test_when_the_window_ends_a_process_that_knows_the_thread_refuses_it",
    ),
    Mutation(
        "a time until when plaintext is accepted ends for a store, too",
        "settings.py",
        "_now() < self.accept_plaintext",
        "True",
        "test_plaintext.py::test_when_the_window_ends_items_in_the_clear_are_refused",
    ),
    Mutation(
        "what is remembered of a plain thread is forgotten when it may not be plain",
        "_ops/shared.py",
        "        return None if is_refused else known\n",
        "        return known\n",
        "test_plaintext.py::test_when_the_window_ends_a_process_that_knows_the_thread_refuses_it",
    ),
    Mutation(
        "a head in the clear is not believed once its thread is sealed",
        "_ops/hot.py",
        "is_sure = known is not None and (known.data_key is not None or shared.keyring is None)",
        "is_sure = True",
        "test_plaintext.py::test_a_head_in_the_clear_from_before_the_thread_was_sealed_is_not_served",
    ),
    Mutation(
        "what is put into a sealed thread's journal in the clear is not stored",
        "_ops/flush.py",
        "kept = [entry for entry in entries if entry.uid not in strange]",
        "kept = entries\n    strange = is_clear",
        "test_plaintext.py::test_what_somebody_puts_into_the_journal_of_a_sealed_thread_in_the_clear_is_dropped",
    ),
    Mutation(
        "steps taken before their thread was sealed are sealed with it",
        "_ops/flush.py",
        "sealed_entry(shared, batch.thread_id, known, entry) if entry.uid in is_clear else entry",
        "entry",
        "test_plaintext.py::test_steps_that_another_process_alone_has_are_sealed_when_it_flushes",
    ),
    Mutation(
        "without Redis, which may hold steps, nothing is sealed",
        "_ops/seal_existing.py",
        "body, needs_hot=True",
        "body, needs_hot=False",
        "test_plaintext.py::test_without_redis_that_may_hold_steps_nothing_is_sealed",
    ),
    Mutation(
        "a thread is not sealed without its key",
        "_ops/seal_existing.py",
        "await session.execute(sql.GIVE_DATA_KEY, ",
        "dict(",
        "test_plaintext.py::test_all_of_a_thread_is_sealed_and_reads_as_before",
    ),
    Mutation(
        "checkpoints are sealed with their metadata",
        "_ops/plain.py",
        "        await session.execute(sql.SEAL_CHECKPOINTS, params)\n",
        "        pass\n",
        "test_plaintext.py::test_all_of_a_thread_is_sealed_and_reads_as_before",
    ),
    Mutation(
        "what is sealed later has its tokens",
        "_ops/seal_items.py",
        "orjson.dumps(tokens(items, root, value)).decode()",
        '"{}"',
        "test_plaintext.py::test_items_are_sealed_with_their_tokens",
    ),
    Mutation(
        "an item is not put in the clear beside the sealing of its root",
        "_ops/items.py",
        '            await session.execute(sql.GUARD_ROOTS, {"roots": plan.plain})\n',
        "            pass\n",
        "test_plaintext.py::test_items_are_put_and_read_while_their_root_is_sealed",
    ),
    Mutation(
        "a root that has items in the clear gets no key beside them",
        "_ops/items.py",
        'if await session.fetch(sql.PLAIN_ROOTS, {"roots": [root]}):\n            return []',
        "pass",
        "test_plaintext.py::test_an_item_put_in_the_clear_a_moment_before_is_not_left_behind",
    ),
    Mutation(
        "what LangGraph encrypted is believed only if it was not changed",
        "_seal/legacy.py",
        "cipher.decrypt_and_verify(ciphertext, tag)",
        "cipher.decrypt(ciphertext)",
        "test_plaintext.py::test_another_key_or_another_serializer_reads_nothing",
    ),
    Mutation(
        "of words the rare ones count more",
        "_ops/lexical.py",
        "    return _SCALE * math.log(1 + (known - count + 0.5) / (count + 0.5))\n",
        "    return _SCALE\n",
        "store/test_lexical.py::test_rare_words_count_more_than_many",
    ),
    Mutation(
        "a score by words tells nothing of other namespaces",
        "_durable/lexical.py",
        "OR t.prefix = %(prefix)s OR starts_with(t.prefix, %(prefix)s || '.'))",
        "OR true)",
        "store/test_lexical.py::test_what_one_namespace_has_tells_nothing_in_another",
    ),
    Mutation(
        "any text is a query by words",
        "_durable/lexical.py",
        r"replace(replace(q.lexeme, '\', '\\'), '''', '''''')",
        "q.lexeme",
        "store/test_lexical.py::test_any_text_can_be_stored_and_asked_for",
    ),
    Mutation(
        "a text that is gone is found by its words no more",
        "_ops/items.py",
        "        await put_texts(items.texts, session, kept)\n",
        "        pass\n",
        "store/test_lexical.py::test_a_text_that_is_gone_is_found_no_more",
    ),
    Mutation(
        "words that a stranger left behind count as none",
        "_durable/lexical.py",
        " AND s.updated_at = t.updated_at\nWHERE t.document",
        "\nWHERE t.document",
        "store/test_lexical.py::test_what_a_stranger_wrote_anew_is_not_found_by_its_old_words",
    ),
    Mutation(
        "reading older texts takes the place of no newer one",
        "_durable/lexical.py",
        "WHERE t.updated_at = (\n",
        "WHERE 'infinity' > (\n",
        "store/test_lexical.py::test_reading_older_texts_takes_the_place_of_no_newer_one",
    ),
    Mutation(
        "words go when their root is sealed",
        "_ops/seal_items.py",
        "    await forget_texts(session, root)\n",
        "",
        "store/test_lexical.py::test_words_go_when_their_root_is_sealed",
    ),
    Mutation(
        "no words are kept of what is sealed",
        "store.py",
        '    if keyring is not None:\n        raise ConfigurationError(\n            "text_search',
        '    if False:\n        raise ConfigurationError(\n            "text_search',
        "store/test_lexical.py::test_words_are_never_kept_of_what_is_sealed",
    ),
    Mutation(
        "all processes read words in one language",
        "_ops/texts.py",
        "    if config == texts.config:\n",
        "    if True:\n",
        "store/test_lexical.py::test_another_language_is_refused_and_the_way_to_it_works",
    ),
    Mutation(
        "pages of a fused order are complete",
        "_ops/ranking.py",
        "max(_LEAST_DEPTH, _PAGES_DEEP * op.limit)",
        "max(_LEAST_DEPTH, op.offset + op.limit)",
        "store/test_lexical.py::test_every_match_is_on_exactly_one_page",
    ),
    Mutation(
        "how far a scan goes is set for one search alone",
        "_ops/ranking.py",
        "        await session.execute(sql.TUNED[name])\n",
        "        pass\n",
        "store/test_lexical.py::test_how_far_a_scan_goes_is_set_for_one_search_alone",
    ),
    Mutation(
        "a step waits no longer than flush_after",
        "_lifecycle.py",
        "    await flush(shared, backend, threads, wait=False)\n",
        "",
        "test_vat.py::test_a_step_waits_no_longer_than_flush_after",
    ),
    Mutation(
        "a forked child shares nothing with its parent",
        "_io/forks.py",
        "    os.register_at_fork(after_in_child=_renew_all)\n",
        "    pass\n",
        "test_processes.py::test_forked_children_share_nothing_with_their_parent --timeout=30",
    ),
]


@contextmanager
def broken(mutation: Mutation) -> Iterator[Path]:
    """Make a copy of the project that breaks the guarantee."""
    with tempfile.TemporaryDirectory(prefix="vat-m-") as name:
        copy = Path(name)
        copy.chmod(0o755)
        for part in ("langgraph_vat", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "langgraph_vat" / mutation.file
        source = file.read_text()
        if source.count(mutation.old) != 1:
            raise SystemExit(f"{mutation.guarantee}: {mutation.file} has no longer what is changed")
        file.write_text(source.replace(mutation.old, mutation.new))
        yield copy


def is_noticed(mutation: Mutation) -> bool:
    """Whether a test fails where the guarantee is broken."""
    tests = [f"tests/{part}" if part[0] != "-" else part for part in mutation.test.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:randomly", *tests]
    with broken(mutation) as copy:
        done = subprocess.run(command, cwd=copy, capture_output=True, check=False)
    return done.returncode == 1


def main() -> None:
    """Print the table; an argument chooses the guarantees that contain it."""
    chosen = [m for m in MUTATIONS if " ".join(sys.argv[1:]) in m.guarantee]
    with ThreadPoolExecutor(2) as pool:
        noticed = list(pool.map(is_noticed, chosen))
    for mutation, is_caught in zip(chosen, noticed, strict=True):
        by = mutation.test.rpartition("::")[2] if is_caught else "NOBODY"
        sys.stdout.write(f"| {mutation.guarantee} | {by} |\n")
    if not all(noticed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
