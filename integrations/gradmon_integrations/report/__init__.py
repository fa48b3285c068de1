"""The command `gradmon report`: one page of HTML about finished runs, from the files that a `JsonlSink` wrote."""
