"""What forks of the test process share, so that one test cannot stop the ranks of another."""

import multiprocessing
import os

from tqdm import tqdm


def _end_inside_tqdm() -> None:
    tqdm.get_lock().acquire()
    os._exit(0)  # as after SIGKILL


def _use_tqdm() -> None:
    tqdm(total=1, disable=False, file=open(os.devnull, "w")).close()
    os._exit(0)


def test_a_rank_that_ends_inside_tqdm_does_not_stop_later_ranks():
    tqdm.get_lock()  # made here, before the forks, as by a data set that this process has read
    context = multiprocessing.get_context("fork")
    for work in (_end_inside_tqdm, _use_tqdm):
        process = context.Process(target=work)
        process.start()
        process.join(20)
        ended, _ = process.exitcode, process.kill()
        assert ended == 0, work.__name__
