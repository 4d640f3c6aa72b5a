"""Processes of tests: forked from one that has imported what takes seconds, and has run nothing."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# there is one such process, so that the modules of all tests are named here
CONTEXT.set_forkserver_preload(["tests.training.worker", "elastic3d.evaluation.runner"])
