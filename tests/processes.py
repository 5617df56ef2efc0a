"""Runs a check in several gloo processes."""

import datetime
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mvmr_loss.distributed import world_size


def _process(rank, processes, store, check, arguments, errors, timeout, meet):
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=processes,
            timeout=datetime.timedelta(seconds=timeout),
        )
        assert world_size() == processes
        check(rank, processes, *arguments)
        if meet:
            dist.barrier()
    except BaseException:
        errors.put(f"process {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def outcomes(processes, tmp_path, check, *arguments, timeout=60, meet=True):
    """Runs ``check(rank, processes, ...)`` in that many gloo processes.

    Returns:
        Each one's exit code, None if it hangs, and the tracebacks.
    """
    # Forked from a server that has imported torch but started no thread: fast, and safe to fork.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mvmr_loss"])
    errors = context.SimpleQueue()
    store = tmp_path / "store"
    workers = [
        context.Process(
            target=_process,
            args=(rank, processes, store, check, arguments, errors, timeout, meet),
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    return codes, messages


def run(processes, tmp_path, check, *arguments):
    """Runs ``check(rank, processes, ...)`` in that many processes; all must end well."""
    codes, messages = outcomes(processes, tmp_path, check, *arguments)
    assert not messages, "\n".join(messages)
    assert None not in codes, "a process hangs"
    assert codes == [0] * processes
