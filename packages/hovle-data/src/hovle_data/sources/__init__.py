"""Other people's files as sequences of samples, through the hook `hovle_datasets` like anyone's plugin.

A source has `len()`, `[i] -> Sample` (raising `BadSample` for a record that cannot be read), `name`, and
`where(i) -> str`, the place to look at: "file:line". It pickles, since `hovle data build` hands it to processes.
Keys are unique within a source; the record's own id is in `meta["id"]`.
"""
