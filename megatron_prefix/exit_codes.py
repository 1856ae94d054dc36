"""What the commands, the ranks and the steps of a job end with."""

DONE = 0
FAILED = 1  # while running; logs say more
BAD_INPUT = 2  # told in one line; nothing was started
SAVED = 75  # stopped by a signal with everything saved (EX_TEMPFAIL): the same command resumes
HUNG = 76  # a rank's own watchdog ended it: no progress for too long
PORT_TAKEN = 77  # where the ranks were to meet, before they came: the next start takes another
