"""The command line: parse, call, render. No decisions here."""
