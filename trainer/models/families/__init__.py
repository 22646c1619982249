"""One file per architecture: a row of facts that tensor shapes cannot tell."""
