"""For plugin authors: `hovle plugin new` writes a package, `hovle plugin test` says what it does not keep yet."""
