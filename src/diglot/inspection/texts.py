"""The texts that are read when no data is given: prose, code, digits, CJK, emoji, whitespace. All written for this."""

# ruff: noqa: E501, RUF001
from __future__ import annotations

BUILT_IN = "built-in texts"

TEXTS = (
    "The harbour was quiet when the last boat came in. Nobody on the quay spoke, because everybody had already seen "
    "that its deck was empty; only the lamp at the mast went on burning, as if somebody would be back in a minute.",
    "First, write down what you know. Second, write down what you want to know. If both lists are short, the problem "
    "is easy; if the first is long and the second short, you have probably not understood the question yet.",
    "Photosynthesis converts light into chemical energy: six molecules of carbon dioxide and six of water become one "
    "of glucose and six of oxygen. Chlorophyll absorbs mostly blue and red light, which is why leaves look green.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError(\"no values\")\n    total = 0.0\n"
    "    for value in values:\n        total += value\n    return total / len(values)\n",
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] != b[i] && !(mask & (1 << i))) {\n\t\tcount -= 2;\n\t}\n}\n\n\nreturn count;\n",
    "A train leaves at 07:45 and covers 318 km in 2.5 hours, so it runs at 318 / 2.5 = 127.2 km/h. In 2024 it carried "
    "1,234,567 passengers, 12345 more than in 2019: 1234567 - 12345 = 1222222.",
    "3 + 4 * 2 = 11, (3 + 4) * 2 = 14, 2^10 = 1024, 17 % 5 = 2, -7 // 2 = -4, 1e-3 < 0.01 <= 0.010",
    "今天下午三点我们在图书馆见面，好吗？数学课的作业一共有二十五道题。",
    "春の朝、川のほとりで古い本を読んでいると、遠くから鐘の音が聞こえてきた。",
    "회의는 내일 오전 열 시에 시작합니다. 자료를 미리 읽어 주세요.",
    "Good morning ☀️! The launch went well 🚀🎉, thanks to the whole team 👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈.",
    "Größe, café, naïve, señor, Ångström, Łódź; Привет, мир; Καλημέρα κόσμε; مرحبا بالعالم; नमस्ते दुनिया",
    "name      | price |  left\n----------+-------+------\nscrew M4  |  0.12 |   480\nwasher    |  0.03 |  1200\n\n\n   end   \n",
    "- milk\n- two eggs\n- 250 g of flour\n\n\"Is that all?\" she asked.\r\n'Yes,' he said -- \"that's all, isn't it?\"\n",
)  # fmt: skip

CONVERSATION = (
    {"role": "user", "content": "What is 12 times 12? Answer in one sentence."},
    {"role": "assistant", "content": "12 times 12 is 144."},
)
