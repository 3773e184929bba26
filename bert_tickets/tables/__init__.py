"""The paper's tables made of finished runs: the entries, the criteria and tests, what is published, how it is written."""
