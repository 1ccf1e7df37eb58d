"""The questions of a report, one a file: each makes a `Finding` of a `Study`, or says why it cannot."""
