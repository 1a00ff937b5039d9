"""The rewriter: single nodes (`splice`) and groups of nodes (`patterns`) are replaced as a pass says, and dumped (`dump`)."""
