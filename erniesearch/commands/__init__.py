"""What each command does: arguments in, one call into the library, exit status out."""
