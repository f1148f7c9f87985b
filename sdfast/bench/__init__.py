"""`sdfast bench`: sdfast beside eager PyTorch and other engines, verified, timed in turns, and drawn.

A part (`ops`, `models`, `images`, `training`) yields rows of one shape, which is all that the table, the page
and the comparison know:

    part, name, dtype      what it is; together they identify a row in another record
    op                     of `ops`: which operation
    sides                  by engine, "sdfast" among them: ms, p20_ms, p80_ms of a warm call, first_ms of the
                           cold one, error, and where they are known peak_bytes and more
    ratios                 by engine: its time by ours, of neighbours in time, as `timing.ratio` has it
    skipped                by engine: why it took no part
    ended                  the engines among them whose process ended
    failed                 instead of times: what went wrong on our side

`command` is the command line, `suite` runs the parts, `record` is the file; one file for each operation holds
its cases.
"""
