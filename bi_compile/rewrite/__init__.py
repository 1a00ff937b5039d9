"""The rewriter: single nodes (`splice`) and patterns of nodes (`patterns`) are replaced as a pass says; `dump` writes what was done."""
