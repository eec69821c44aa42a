# SPDX-License-Identifier: Apache-2.0
"""A streaming OpenAI client for `prefixquant serve CHECKPOINT`.

prefixquant serve model-w4a4kv4 &
python examples/chat_client.py "Why is the sky blue?"
"""

import sys

from openai import OpenAI


def main(model: str, question: str, url: str = "http://127.0.0.1:8000/v1") -> None:
    client = OpenAI(base_url=url, api_key="none")
    parts = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        stream=True,
    )
    for part in parts:
        if part.choices:
            sys.stdout.write(part.choices[0].delta.content or "")
            sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
